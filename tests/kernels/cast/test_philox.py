import pytest
import torch

from parco.kernels.cast import philox4x32, random_bits

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32, 10 rounds
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in words] == expected


def test_bits_belong_to_coordinates():
    whole = random_bits(9, range(20), 37)
    assert torch.equal(random_bits(9, range(5, 11), 37), whole[5:11])
    assert torch.equal(random_bits(9, range(20), 6), whole[:, :6])
    far = 1 << 33
    assert not torch.equal(random_bits(9, range(far, far + 20), 37), whole)
    word = philox4x32(tuple(torch.tensor([v]) for v in (3, 18 >> 2, 0, 0)), (9, 0))[18 & 3]
    assert whole[3, 18] == word


def test_seeds_and_calls_differ():
    draws = [random_bits(seed, range(4), 8, call=call) for seed in (0, 1, 1 << 32) for call in (0, 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 6


def test_words_are_uniform():
    bits = random_bits(4, range(256), 256)
    assert bits.min() >= 0
    assert bits.max() < 1 << 32
    ones = ((bits[..., None] >> torch.arange(32)) & 1).double().mean((0, 1))
    # 65,536 fair draws per bit: standard deviation 0.002; six of them.
    assert ((ones - 0.5).abs() < 0.012).all()


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_refused_seeds(seed):
    with pytest.raises(ValueError, match=f"seed={seed}"):
        random_bits(seed, range(1), 1)
    with pytest.raises(ValueError, match="call=-1"):
        random_bits(0, range(1), 1, call=-1)
