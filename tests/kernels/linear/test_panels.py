"""Panels: what the compiled packing does is what plain torch does, and undone it is what it was."""

import pytest
import torch
from torch import Tensor

from parco.formats import Format
from parco.kernels.cast import encode
from parco.kernels.linear import pack, packs, panels, unpack

SHAPES = [(1, 32), (16, 64), (37, 96), (50, 1280)]


def tensors(format: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return dict(encode(matrix, format).tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "int2:32",
        "int3:32",
        "int4:32:asym",
        "int5:32",
        "int6:row",
        "int8:32",
        "mxfp4",
        "mxfp6_e2m3",
        "nf4:64",
        "fp8_e4m3:row",
        "mxfp8_e4m3",
        "mxfp6_e3m2",
    ],
)
def test_compiled_packing_is_the_plain_one(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    format = Format.parse(name)
    assert packs(format, shape)
    before = tensors(format, shape)
    packed = pack(format, shape, before)
    assert {key: (tuple(value.shape), value.dtype) for key, value in packed.items()} == {
        key: (spec.shape, spec.dtype) for key, spec in panels.specs(format, shape).items()
    }
    after = unpack(format, shape, packed)
    assert all(torch.equal(after[key], before[key]) for key in before)

    # In plain torch, as on any device but the CPU.
    monkeypatch.setattr(panels, "COMPILED", False)
    assert torch.equal(pack(format, shape, before)["codes"], packed["codes"])
    assert torch.equal(unpack(format, shape, packed)["codes"], before["codes"])
    padding = packed["codes"].view(torch.int32).view(len(packed["codes"]), -1, 16)[-1][:, (shape[0] - 1) % 16 + 1 :]
    assert not padding.any()


@pytest.mark.parametrize("name", ["int4:32", "int3:32"])
def test_a_row_that_is_not_whole_dwords_is_refused(name: str) -> None:
    format = Format.parse(name)
    assert not packs(format, (4, 36))
    with pytest.raises(ValueError, match="36 codes of int"):
        pack(format, (4, 36), tensors(format, (4, 36)))


def test_the_meta_device_has_the_same_shapes() -> None:
    format, shape = Format.parse("int5:32"), (37, 96)
    meta = {key: value.to("meta") for key, value in tensors(format, shape).items()}
    packed = pack(format, shape, meta)
    assert {key: tuple(value.shape) for key, value in packed.items()} == {
        key: spec.shape for key, spec in panels.specs(format, shape).items()
    }
    assert {key: value.shape for key, value in unpack(format, shape, packed).items()} == {
        key: value.shape for key, value in meta.items()
    }
