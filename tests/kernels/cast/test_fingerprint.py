"""What tells a matrix from others by its bits."""

import itertools

import pytest
import torch

from parco.kernels.cast.fingerprint import fingerprint


def changed(x: torch.Tensor) -> list[torch.Tensor]:
    """Matrices that differ from `x` in ways that sums and exclusive ors do not see."""
    found = [-x, x.flip(0), x.flip(1), x * 2, x.roll(1, 1), x.clone(), x.clone(), x.clone()]
    found[5][:, ::2] *= -1
    found[6][-1, -1] += 1
    found[7][0, 0] *= -1
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (7, 33), (64, 96), (700, 901)], ids=str)
def test_other_bits_have_other_fingerprints(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    every = [x, *changed(x)]
    found = [fingerprint(each) for each in every]
    assert None not in found and fingerprint(x.clone()) == found[0]
    for (one, a), (other, b) in itertools.combinations(zip(every, found, strict=True), 2):
        assert (a == b) == torch.equal(one, other)


def test_threads_do_not_matter_and_columns_are_read_too() -> None:
    x = torch.randn(900, 1200)  # more than one chunk
    found, threads = fingerprint(x), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert fingerprint(x) == found
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(x.T) == found
    assert fingerprint(x[:, :100]) is None
    assert fingerprint(torch.empty(0, 5)) is not None
