"""Philox4x32-10: random bits that are a function of a key and of coordinates, of nothing else.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter of four 32-bit words goes through
ten rounds under a key of two words and gives four random words. Since an element's bits come from its row and column,
never from a thread or a tile, every implementation on every device draws the same.

Words are held in int64: torch has no arithmetic on uint32, and the low 64 bits of a wrapped product are the right
ones.
"""

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four words of random bits for each counter.

    `counter` is four int64 tensors of one shape (or broadcastable) with values in [0, 2**32); `key` two such
    integers. Returns four int64 tensors in the same range. Zero counter and key give 6627e8d5 e169c58d bc57ac4c
    9b00dbd8.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        product0, product1 = word0 * MULTIPLIERS[0], word2 * MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & WORD, product0 & WORD
        high1, low1 = (product1 >> 32) & WORD, product1 & WORD
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return word0, word1, word2, word3


def random_bits(
    seed: int, rows: range, columns: int | range, *, call: int = 0, device: torch.device | None = None
) -> Tensor:
    """32 random bits for every element of the given rows and columns (a number: the first ones) of a matrix: int64
    [len(rows), len(columns)] in [0, 2**32).

    The counter of element (row, column) is (row mod 2**32, column >> 2, row >> 32, call) and its word is column & 3;
    the key is the low and the high half of `seed`. ValueError for a seed outside [0, 2**64) or a call outside [0,
    2**32).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed}: must lie in [0, 2**64)")
    if not 0 <= call <= WORD:
        raise ValueError(f"call={call}: must lie in [0, 2**32)")
    row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)[:, None]
    columns = range(columns) if isinstance(columns, int) else columns
    skipped = columns.start % 4
    quad = torch.arange(columns.start // 4, -(-columns.stop // 4), device=device, dtype=torch.int64)[None, :]
    counter = torch.broadcast_tensors(row & WORD, quad, row >> 32, torch.full_like(quad, call))
    words = philox4x32((counter[0], counter[1], counter[2], counter[3]), (seed & WORD, seed >> 32))
    return torch.stack(words, dim=-1).reshape(len(rows), -1)[:, skipped : skipped + len(columns)]


def dropout_factors(seed: Tensor, rows: int, columns: int, p: float, *, device: torch.device | None = None) -> Tensor:
    """What dropout multiplies numbers by, fp32 [rows, columns]: 0 where their bits under `seed`, one int64, are below
    p·2**32, else 1 / (1 - p), p being below 1.
    """
    drawn = random_bits(int(seed) % (1 << 64), range(rows), columns, device=device)
    return torch.where(drawn < int(p * 2**32), 0.0, 1 / (1 - p)).to(torch.float32)
