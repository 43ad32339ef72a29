"""Random Hadamard transforms, which spread a block's outliers over the block before it is cast.

H = diag(signs) · H_size / sqrt(size) with Sylvester's H_size, on every `size` neighbours (NVFP4's recipe, arXiv
2509.25149, takes 16). H is orthogonal: where both operands of a product are transformed along the dimension that is
summed over, the product stays what it was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parco.kernels.cast.philox import random_bits

SIZES = (16, 32, 64, 128)
_AT_ONCE = 1 << 17
"""Numbers whose transforms are in work together."""


@dataclass(frozen=True)
class Hadamard:
    """The transform of every `size` (16, 32, 64 or 128) neighbours of a row, its signs drawn from `seed`.

    `hadamard(x)` is x [..., K] transformed, in fp32. ValueError for another size, a seed outside [0, 2⁶⁴), or rows
    that are no multiple of the size.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_size("size", self.size)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed}: must lie in [0, 2**64)")

    def __call__(self, x: Tensor) -> Tensor:
        self.check(x.shape[-1])
        return transform(x, self.size, self.seed)

    def check(self, columns: int) -> None:
        """ValueError unless so many numbers can be transformed."""
        if columns % self.size:
            raise ValueError(
                f"{columns} numbers in a row: a Hadamard transform of {self.size} needs a multiple of it in a row"
            )


def check_size(name: str, size: int) -> None:
    """ValueError unless a transform of `size` exists."""
    if size not in SIZES:
        raise ValueError(f"{name}={size}: a Hadamard transform has the size {', '.join(map(str, SIZES))}")


def signs(size: int, seed: int) -> Tensor:
    """±1 / sqrt(size), fp32 [size]: negative where the lowest of an element's 32 random bits (Philox, row 0) is set."""
    drawn = random_bits(seed, range(1), size, device=torch.device("cpu"))[0] & 1
    return (1 - 2 * drawn).to(torch.float32) * torch.tensor(size**-0.5, dtype=torch.float32, device="cpu")


def transform(x: Tensor, size: int, seed: int) -> Tensor:
    """What `Hadamard(size, seed)(x)` is: sums and differences of neighbours 1, 2, 4 ... apart, in this order."""
    numbers = x.to(torch.float32).unflatten(-1, (-1, size)) * signs(size, seed).to(x.device)
    apart = 1
    while apart < size:
        pairs = numbers.unflatten(-1, (-1, 2, apart))
        first, second = pairs.unbind(-2)
        numbers = torch.stack([first + second, first - second], -2).flatten(-3)
        apart *= 2
    return numbers.flatten(-2)


def turned_amax(x: Tensor, size: int, seed: int, group: int) -> Tensor:
    """The greatest magnitude of each `group` neighbours, which divide `size`, of the transpose of `x` [N, K] after its
    transform: fp32 [N / group, K], NaN where one of them is. x is read by rows, some at a time, so that the sums of a
    transform stay in the cache.
    """
    rows, columns = x.shape
    scale = signs(size, seed).to(x.device)[:, None]
    step = max(1, _AT_ONCE // (size * max(columns, 1))) * size
    found: list[Tensor] = []
    for first in range(0, rows, step):
        numbers = x[first : first + step].to(torch.float32).unflatten(0, (-1, size)) * scale
        spare = torch.empty_like(numbers)
        apart = 1
        while apart < size:
            left, right = numbers.unflatten(1, (-1, 2, apart)).unbind(2)
            sums = spare.unflatten(1, (-1, 2, apart))
            torch.add(left, right, out=sums[:, :, 0])
            torch.sub(left, right, out=sums[:, :, 1])
            numbers, spare = spare, numbers
            apart *= 2
        found.append(numbers.abs_().unflatten(1, (-1, group)).amax(2).flatten(0, 1))
    return torch.cat(found)


def turned(x: Tensor, seed: int) -> Tensor:
    """x [..., K] in other coordinates, for any K: the transform of every 128 neighbours, and of the powers of two that
    are left of K. It is orthogonal. fp64 of fp64, else fp32.

    Products with matrices take fewer passes over a few rows of x than sums and differences do.
    """
    return _by_blocks(x, seed, back=False)


def turned_back(x: Tensor, seed: int) -> Tensor:
    """What `turned` makes into x."""
    return _by_blocks(x, seed, back=True)


def blocks(columns: int) -> list[tuple[int, int, int]]:
    """(first, last, size) of the runs of blocks of one size in `columns` neighbours."""
    found: list[tuple[int, int, int]] = []
    size, start = SIZES[-1], 0
    while start < columns:
        stop = columns - (columns - start) % size
        if stop > start:
            found.append((start, stop, size))
        start, size = stop, size // 2
    return found


def _by_blocks(x: Tensor, seed: int, back: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts: list[Tensor] = []
    for first, last, size in blocks(x.shape[-1]):
        turn = _matrix(size, seed).to(device=x.device, dtype=dtype)
        numbers = x[..., first:last].to(dtype).unflatten(-1, ((last - first) // size, size))
        parts.append((numbers @ (turn.T if back else turn)).flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


_MATRICES: dict[tuple[int, int], Tensor] = {}


def _matrix(size: int, seed: int) -> Tensor:
    """The transform of `size` neighbours as a matrix [size, size] by which x is multiplied from the right."""
    found = _MATRICES.get((size, seed))
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = transform(torch.eye(size, device="cpu"), size, seed)
        if type(found) is Tensor:  # and no stand-in of a tracer's, which must not outlive it
            _MATRICES[size, seed] = found
    return found
