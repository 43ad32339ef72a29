"""parco.bench's peers: each that is installed multiplies, and one that is not costs nothing."""

import pytest
import torch

from parco import bench
from parco.bench import peers

SHAPE = (64, 128)


@pytest.mark.parametrize("name", ["torchao", "bitsandbytes"])
@pytest.mark.parametrize("rows", [1, 20])
def test_an_installed_peer_multiplies(name: str, rows: int) -> None:
    pytest.importorskip(name)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.double() @ weight.double().T
    found = peers.of([name])
    assert len({contender.name for contender in found}) == len(found) > 1
    with torch.inference_mode():
        for contender in found:
            if contender.name.endswith("compiled"):
                continue  # minutes of a C++ compiler for the same function
            stored = contender.make(weight)
            y = contender.run(x, *stored)
            bits = 4 if "nf4" in contender.name else 8
            elements = SHAPE[0] * SHAPE[1]
            assert elements * bits // 8 < contender.size(*stored) < elements * (bits + 4) // 8, contender.name
            # NF4's steps next to 1 are a quarter of the greatest number, int8's 1/127.
            worst = 0.15 if bits == 4 else 0.02
            assert (y.double() - wanted).norm() < worst * wanted.norm(), contender.name


def test_peers_are_those_installed_and_torch_is_always_one() -> None:
    assert "torch" in bench.installed()
    assert set(bench.installed()) <= set(bench.PEERS)
    names = [contender.name for contender in bench.contenders(SHAPE, 1, [])]
    assert names[:2] == ["torch fp32", bench.BASELINE]


def test_an_unknown_peer_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(ValueError, match="--peers numpy is no peer; here are torch"):
        bench.run({SHAPE: 1}, formats=["int4:32"], rows=[1], rounds=1, between=1, peers=["numpy"])


def test_bytes_of_what_a_peer_holds_are_those_inside() -> None:
    class Inside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, 5))
            self.register_buffer("scale", torch.zeros(7, dtype=torch.bfloat16))

    assert peers.nbytes(Inside(), torch.zeros(2, dtype=torch.int8)) == 60 + 14 + 2
