"""Products of two matrices that are both stored in 4 bits."""

import itertools
from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws, forget_choices

from parco import decode, encode, explain, machine
from parco.formats import Format
from parco.kernels import table
from parco.kernels.cast import decode_tensors
from parco.kernels.linear import linear_both, takes_both
from parco.weights import Quantized

PAIRS = (
    *(("nvfp4", "nvfp4"), ("nvfp4", "nvfp4:16x16"), ("mxfp4", "mxfp4")),
    *(("fp4_e2m1:1x32", "fp4_e2m1:32x32"), ("nvfp4", "fp4_e2m1:1x16")),
)
SHAPES = ((1, 1, 1), (3, 5, 33), (7, 40, 16), (13, 17, 160), (50, 33, 129), (5, 7, 31))
"""Rows, outputs, columns: odd ones, one group or less, more rows than a band has, ends of groups, bytes and vectors."""


def stored(matrix: torch.Tensor, name: str) -> tuple[Any, Any, Any]:
    tensors = encode(matrix, name).tensors
    return tensors["codes"], tensors["scale"], tensors.get("global_scale")


def arguments(pair: tuple[str, str], shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    rows, outputs, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, w = (torch.randn(count, columns, generator=generator) for count in (rows, outputs))
    x *= torch.logspace(-3, 3, rows)[:, None]  # scales that differ
    return (*stored(x, pair[0]), *stored(w, pair[1]), *pair, columns, dtype)


def numbers(call: tuple[Any, ...]) -> list[torch.Tensor]:
    """Both matrices in fp64."""
    found = []
    for tensors, name in ((call[:3], call[6]), (call[3:6], call[7])):
        shape = tensors[0].shape[0], call[8]
        named = dict(zip(("codes", "scale", "global_scale"), tensors, strict=True))
        found.append(decode_tensors(name, shape, {k: each for k, each in named.items() if each is not None}).double())
    return found


class TestLinearBoth(KernelLaws):
    operation = "linear_both"

    @pytest.fixture(
        params=[*itertools.product(PAIRS, SHAPES, (torch.float32,)), (PAIRS[0], (9, 20, 48), torch.bfloat16)], ids=str
    )
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return arguments(*request.param)

    def assert_agrees(self, found: torch.Tensor, expected: torch.Tensor, call: tuple[Any, ...], name: str) -> None:
        x, w = numbers(call)
        exact, size = x @ w.T, x.abs() @ w.abs().T
        step = 2.0**-8 if call[-1] == torch.bfloat16 else 2.0**-21
        assert ((found.double() - exact).abs() <= step * size).all(), name


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_rows_and_threads_do_not_change_a_bit(pair: tuple[str, str]) -> None:
    if "avx512" not in machine.detect().isas:
        pytest.skip("the reference's sums are torch's")
    call = arguments(pair, (1100, 70, 96), torch.float32)  # more rows than are taken at a time
    whole = linear_both(*call)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(linear_both(*call), whole)
    finally:
        torch.set_num_threads(threads)
    one = linear_both(call[0][1050:1051], call[1][1050:1051], *call[2:])
    assert torch.equal(one[0], whole[1050])


def test_nan_and_the_ends_of_scales() -> None:
    x, w = torch.randn(4, 64), torch.randn(6, 64)
    x[1, 40], x[2], x[3] = float("nan"), 2.0**-140, 2.5e38
    w[4], w[5] = 2.0**-100, 0
    w[:4] *= 2.0**-20
    found = linear_both(*stored(x, "mxfp4"), *stored(w, "mxfp4"), "mxfp4", "mxfp4", 64)
    exact = decode(encode(x, "mxfp4")).double() @ decode(encode(w, "mxfp4")).double().T
    assert found[1].isnan().all() and not found[[0, 2, 3]].isnan().any()
    assert (found[:, 5][[0, 2, 3]] == 0).all()
    torch.testing.assert_close(found[[0, 2, 3]].double(), exact[[0, 2, 3]], rtol=1e-5, atol=2.0**-149)


def test_nothing_to_multiply() -> None:
    for shape in ((0, 3, 32), (3, 0, 32)):
        assert linear_both(*arguments(PAIRS[2], shape, torch.float32)).shape == shape[:2]


@pytest.mark.parametrize(
    ("x_format", "format"),
    [
        ("mxfp8_e4m3", "mxfp8_e4m3"),
        ("nvfp4", "mxfp4"),
        ("int4:32", "int4:32"),
        ("nvfp4:16x16", "nvfp4"),
        ("bf16", "nvfp4"),
    ],
)
def test_other_formats_are_refused(x_format: str, format: str) -> None:
    assert not takes_both(Format.parse(x_format), Format.parse(format))
    call = arguments(PAIRS[0], (2, 2, 32), torch.float32)
    with pytest.raises(ValueError, match=f"x_format='{x_format}' by format='{format}'; x must be a 4-bit float"):
        linear_both(*call[:6], x_format, format, 32)


def test_what_does_not_fit_is_named() -> None:
    call = arguments(PAIRS[0], (2, 3, 32), torch.float32)
    with pytest.raises(ValueError, match="linear_both, of x: codes has the shape"):
        linear_both(call[0][:, 1:], *call[1:])
    with pytest.raises(ValueError, match=r"linear_both: x_codes has the shape .*; codes by rows, a matrix, are needed"):
        linear_both(call[0][0, 0], *call[1:])
    spec = Quantized("nvfp4", (16, 64))
    packed = spec.pack(*spec.encode(torch.randn(16, 64)))
    with pytest.raises(ValueError, match=r"linear_both: codes has the shape .*; codes by rows, a matrix, are needed"):
        linear_both(*stored(torch.randn(2, 64), "nvfp4"), *packed, *PAIRS[0], 64)
    with pytest.raises(ValueError, match="linear_both: scale has the shape"):
        linear_both(*call[:4], call[4][1:], *call[5:])
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        linear_both(*call[:-1], torch.int8)


def test_the_bytes_of_avx512_are_used_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = explain("linear_both", *arguments(PAIRS[0], (2, 3, 32), torch.float32))
    kernels = table.operations()["linear_both"].kernels
    assert said.kernel == next(each.name for each in kernels if each.isa == table.TORCH or machine.has(each.isa))
    assert machine.has("avx512") == (said.kernel != "both-linear-torch")
    monkeypatch.setenv("PARCO_ISA", "generic")
    forget_choices()
    (said,) = explain("linear_both", *arguments(PAIRS[0], (2, 3, 32), torch.float32))
    monkeypatch.undo()
    forget_choices()
    assert said.kernel == "both-linear-torch"
