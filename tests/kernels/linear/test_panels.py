"""Panels: what the compiled packing does is what plain torch does, and undone it is what it was."""

import pytest
import torch
from torch import Tensor

from parco.formats import Format
from parco.kernels import table
from parco.kernels.cast import encode
from parco.kernels.linear import pack, packs, panels, unpack
from parco.kernels.linear.prepared import prepared
from parco.weights import Quantized

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
        "ternary5:32",
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


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("columns", [96, 131])
def test_digits_multiply_as_bits_do(columns: int, rows: int) -> None:
    """Panels are the same, and so are the products' bits, by rows too, where panels are not possible."""
    matrix, x = torch.randn(37, columns), torch.randn(rows, columns).bfloat16()
    specs = [Quantized(name, (37, columns)) for name in ("ternary5", "ternary")]
    digits, bits = ([spec.encode(matrix), spec.pack(*spec.encode(matrix))] for spec in specs)
    assert torch.equal(digits[1][0], bits[1][0]) == (columns == 96)
    products = [spec.apply(x, *tensors) for spec, both in zip(specs, (digits, bits), strict=True) for tensors in both]
    assert all(torch.equal(product, products[0]) for product in products)


def test_explain_says_where_digits_are_rewritten() -> None:
    (found,) = table.explain(Quantized("ternary5", (32, 96)), rows=2)
    assert "in panels" in str(found) and "digits" not in str(found)
    (found,) = table.explain(Quantized("ternary5", (32, 131)), rows=2)
    assert found.kernel.startswith("int-linear") and "digits written as bits first" in str(found)


def test_a_call_that_keeps_addresses_takes_no_digits() -> None:
    spec = Quantized("ternary5", (32, 96))
    tensors = spec.encode(torch.randn(32, 96))
    assert prepared(torch.float32, tensors, None, "ternary5 32x96") is None
    assert prepared(torch.float32, spec.pack(*tensors), None, "ternary5 32x96") is not None
