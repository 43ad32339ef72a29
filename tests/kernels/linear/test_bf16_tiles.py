"""bf16 products on AMX tiles: through the tile instructions written in C++ where AVX-512 is there, and through the
processor's where they are.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.kernels.linear.test_coded import Stored, decoded, inputs, packed, stored
from tests.kernels.linear.test_epilogue import assert_finished
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.activations import ACTIVATIONS
from parco.kernels.linear.coded import CodedCall
from parco.kernels.linear.dense import DenseCall, compiled
from parco.kernels.linear.launches import Compiled
from parco.kernels.linear.storage import storage
from parco.weights import Dense, Quantized

BF16 = torch.bfloat16
FORMATS = [
    "fp8_e4m3", "fp8_e4m3:row", "fp8_e5m2:row", "fp8_e4m3:tensor:delayed", "fp8_e4m3:128x128", "fp8_e5m2:16x32",
    "fp8_e4m3:48", "fp8_e4m3:16", "mxfp8_e4m3", "mxfp8_e5m2", "fp6_e3m2", "mxfp6_e3m2", "mxfp6_e2m3", "nf4:64",
    "nf4:row", "nf4:32:fp32", "nf4:48", "mxfp4", "nvfp4", "nvfp4:16x16",
]  # fmt: skip
EXACT = ["fp8_e4m3:row", "fp8_e5m2:row", "fp8_e4m3", "mxfp8_e4m3", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "nvfp4"]
"""Formats whose weights are bf16 numbers but for a scale that multiplies the sum."""


def coded_kernels() -> Iterator[tuple[str, Compiled]]:
    if "avx512_vbmi" in machine.detect().isas:
        yield "emulated", Compiled(_C.float_amx_emulated)
    if "amx" in machine.detect().isas:
        yield "amx", Compiled(_C.float_amx)


def dense_kernels() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    if "avx512_vbmi" in machine.detect().isas:
        yield "emulated", compiled(_C.linear_dense_amx_emulated)
    if "amx" in machine.detect().isas:
        yield "amx", compiled(_C.linear_dense_amx)


def panels(format: str, outputs: int, columns: int) -> tuple[Stored, Stored]:
    """Tensors of a random matrix by rows, and the same in panels."""
    rows = stored(format, outputs, columns)
    return rows, packed(rows, format, (outputs, columns))


def assert_within(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rounding: float, name: str) -> None:
    """Each weight rounded by `rounding` of itself, fp32 sums of K products, scale and bias, one rounding to bf16."""
    added = 0 if bias is None else bias.double()
    expected = x.double() @ weight.double().T + added
    magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = (rounding + (x.shape[-1] + 4) * 2.0**-24) * magnitude
    assert ((y.double() - expected).abs() <= bound + 2.0**-8 * (expected.abs() + bound)).all(), name


@pytest.mark.parametrize("format", FORMATS)
def test_stored_weights_are_within_their_bound(format: str) -> None:
    """Codes by rows and in panels: the same bits."""
    for rows, outputs, columns in ((16, 16, 32), (21, 37, 95), (200, 33, 320), (64, 130, 2240), (49, 5, 4192)):
        tensors = stored(format, outputs, columns)
        x, weight = inputs(rows, columns, dtype=BF16), decoded(tensors, format, columns)
        bias = inputs(outputs, dtype=BF16, seed=3) if rows % 2 else None
        for name, run in coded_kernels():
            y = run(x, *tensors, bias, format, columns)
            assert_within(y, x, weight, bias, 0 if format in EXACT else 2.0**-9, name)
            if storage(format).packs((outputs, columns)):
                own = packed(tensors, format, (outputs, columns))
                assert torch.equal(run(x, *own, bias, format, columns, outputs), y), name


@pytest.mark.parametrize(
    "shape", [(16, 16, 32), (1, 1, 1), (21, 37, 95), (200, 33, 321), (65, 130, 2309), (49, 5, 4613)]
)
def test_dense_weights_are_within_their_bound(shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    x, weight = inputs(rows, columns, dtype=BF16), inputs(outputs, columns, dtype=BF16, seed=6)
    for bias in (None, inputs(outputs, seed=7), inputs(outputs, dtype=BF16, seed=7)):
        for name, run in dense_kernels():
            assert_within(run(x, weight, bias), x, weight, bias, 0, name)


@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_an_activation_and_an_addend_end_a_product(activation: str) -> None:
    """On the fp32 sum, so that one rounding is left; the addend alone tells what the sum was."""
    rows, outputs, columns = 37, 45, 2240
    x, weight = inputs(rows, columns, dtype=BF16), inputs(outputs, columns, dtype=BF16, seed=6) / 48
    tensors, addend = stored("mxfp8_e4m3", outputs, columns), inputs(rows, outputs, seed=5)
    runs = [(lambda *after, run=run: run(x, weight, None, *after), weight) for _, run in dense_kernels()]
    matrix = decoded(tensors, "mxfp8_e4m3", columns)
    for _, run in coded_kernels():
        runs.append((lambda *after, run=run: run(x, *tensors, None, "mxfp8_e4m3", columns, outputs, *after), matrix))
    for run, of in runs:
        before = x.double() @ of.double().T
        spread = (columns + 8) * 2.0**-24 * (x.double().abs() @ of.double().abs().T)
        for added in (None, addend, addend.to(BF16)):
            assert_finished(run(activation, added), before, activation, added, spread)


def over_rows_and_threads(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(x)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for rows in (1, 16, 17, 33, 48, 50, 97, x.shape[0]):
                assert torch.equal(run(x[:rows]), whole[:rows]), (count, rows)
            assert torch.equal(run(x[7:40]), whole[7:40]), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", ["fp8_e4m3:row", "mxfp8_e5m2", "nf4:64", "nvfp4"])
def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_the_threads(format: str) -> None:
    """Of one block of k and few rows, and of several of both: 1,029 rows are more than are multiplied at once."""
    for most, outputs, columns in ((229, 70, 2560), (1029, 150, 128)):
        _, tensors = panels(format, outputs, columns)
        for _, run in coded_kernels():
            over_rows_and_threads(
                lambda x, run=run, tensors=tensors, columns=columns, outputs=outputs: run(
                    x, *tensors, None, format, columns, outputs
                ),
                inputs(most, columns, dtype=BF16),
            )


def test_a_row_of_a_dense_product_depends_on_neither() -> None:
    for most, outputs, columns in ((229, 2200, 160), (1029, 70, 100), (64, 50, 4700)):
        weight = inputs(outputs, columns, dtype=BF16, seed=6)
        for _, run in dense_kernels():
            over_rows_and_threads(
                lambda x, run=run, weight=weight: run(x, weight, None), inputs(most, columns, dtype=BF16)
            )


@pytest.mark.parametrize(
    "format", ["fp8_e4m3:row", "fp8_e4m3:128x128", "mxfp8_e4m3", "mxfp4", "nvfp4", "nf4:64", "bf16"]
)
def test_no_more_is_lost_than_torch_loses(format: str) -> None:
    """Law 6: at most twice torch's own error on the decoded weights in bf16, both against fp64; and the tolerance that
    the Weight promises.
    """
    shape = (128, 1024)
    spec = Dense(shape, "bf16") if format == "bf16" else Quantized(format, shape)
    tensors = spec.encode(inputs(*shape))
    x, weight = inputs(24, shape[1], dtype=BF16), spec.dense(*tensors)
    expected = x.double() @ weight.double().T
    theirs = torch.nn.functional.linear(x, weight.to(BF16)).double() - expected
    for y in (
        [run(x, tensors[0], None) for _, run in dense_kernels()]
        if isinstance(spec, Dense)
        else [run(x, *_in_order(spec, tensors), None, format, shape[1], shape[0]) for _, run in coded_kernels()]
    ):
        ours = y.double() - expected
        assert ours.norm() <= 2 * theirs.norm()
        assert (ours.abs() <= spec.tolerance(BF16) * (x.double().abs() @ spec.magnitude(*tensors).double().T)).all()


def _in_order(spec: Quantized, tensors: tuple[Tensor, ...]) -> Stored:
    named = dict(zip(spec.tensors(), tensors, strict=True))
    rows = (named["codes"], named.get("scale"), named.get("zero"), named.get("global_scale"))
    return packed(rows, str(spec.format), spec.shape)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_reaches_its_row_and_no_other(bad: float) -> None:
    _, tensors = panels("mxfp8_e4m3", 21, 96)
    weight = inputs(21, 90, dtype=BF16, seed=6).abs() + 0.1
    for (_, coded), (_, dense) in zip(coded_kernels(), dense_kernels(), strict=True):
        for columns, run in (
            (96, lambda x, coded=coded: coded(x, *tensors, None, "mxfp8_e4m3", 96, 21)),
            (90, lambda x, dense=dense: dense(x, weight, None)),
        ):
            x = inputs(35, columns, dtype=BF16)
            clean = run(x)
            x[33, columns - 1] = bad
            y = run(x)
            assert not y[33].isfinite().any()
            others = [row for row in range(35) if row != 33]
            assert torch.equal(y[others], clean[others])
        x, own = inputs(20, 90, dtype=BF16).abs() + 0.1, weight.clone()
        own[17, 89] = bad
        y = dense(x, own, None)
        assert torch.equal(y[:, 17].float().nan_to_num(7.0), torch.full((20,), bad).nan_to_num(7.0))
        assert y[:, :17].isfinite().all()
        assert y[:, 18:].isfinite().all()


@pytest.mark.parametrize(
    ("format", "code", "value"),
    [
        ("fp8_e4m3:row", 0x7F, "nan"),
        ("mxfp8_e4m3", 0xFF, "nan"),
        ("fp8_e5m2:row", 0x7C, "inf"),
        ("mxfp8_e5m2", 0xFC, "-inf"),
    ],
)
def test_codes_that_are_no_numbers(format: str, code: int, value: str) -> None:
    codes, *scales = stored(format, 21, 96)
    codes[4, 70] = code
    tensors = packed((codes, *scales), format, (21, 96))  # pyright: ignore[reportArgumentType]
    x = inputs(20, 96, dtype=BF16).abs() + 0.1
    for name, run in coded_kernels():
        y = run(x, *tensors, None, format, 96, 21)
        assert torch.equal(y[:, 4].float().nan_to_num(7.0), torch.full((20,), float(value)).nan_to_num(7.0)), name
        assert y[:, :4].isfinite().all(), name
        assert y[:, 5:].isfinite().all(), name


@pytest.mark.parametrize(
    ("format", "nan"), [("mxfp4", 255), ("mxfp8_e4m3", 255), ("nvfp4", 127), ("nf4:32:fp32", None)]
)
def test_a_scale_that_is_no_number(format: str, nan: int | None) -> None:
    codes, scale, zero, factor = stored(format, 21, 96)
    assert scale is not None
    if nan is None:  # of the greatest payload
        scale.view(torch.int32)[4, 1] = 0x7FFFFFFF
    else:
        scale[4, 1] = nan
    tensors = packed((codes, scale, zero, factor), format, (21, 96))
    for name, run in coded_kernels():
        y = run(inputs(20, 96, dtype=BF16), *tensors, None, format, 96, 21)
        assert y[:, 4].isnan().all(), name
        assert y[:, :4].isfinite().all(), name
        assert y[:, 5:].isfinite().all(), name


def test_the_greatest_scale_of_mx_and_the_least_that_is_normal() -> None:
    """Codes of 1.5 under 2^127 and 2^-126; smaller weights count as zero, unless one scale multiplies their sum."""
    for format, codes in (("mxfp4", [0x33] * 16), ("mxfp8_e4m3", [0x3C] * 32)):
        for groups, least in ((1, 1.5 * 2.0**-127), (2, 0.0)):
            columns = 32 * groups
            x = torch.zeros(17, columns, dtype=BF16)
            x[:, 5] = 1.0
            row = torch.tensor([codes * groups] * 3, dtype=torch.uint8)
            for code, expected in ((254, 1.5 * 2.0**127), (1, 1.5 * 2.0**-126), (0, least)):
                rows = row, torch.full((3, groups), code, dtype=torch.uint8), None, None
                for name, run in coded_kernels():
                    y = run(x, *packed(rows, format, (3, columns)), None, format, columns, 3)
                    assert torch.equal(y, torch.full((17, 3), expected, dtype=BF16)), (format, name)


def test_operands_at_odd_addresses() -> None:
    def odd(tensor: Tensor) -> Tensor:
        raw = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        return raw.copy_(tensor)

    x, weight = inputs(37, 96, dtype=BF16), inputs(50, 96, dtype=BF16, seed=6)
    for _, run in dense_kernels():
        assert torch.equal(run(odd(x), odd(weight), None), run(x, weight, None))
    _, (codes, scale, _, _) = panels("mxfp8_e4m3", 50, 96)
    assert scale is not None
    for _, run in coded_kernels():
        expected = run(x, codes, scale, None, None, None, "mxfp8_e4m3", 96, 50)
        assert torch.equal(run(odd(x), odd(codes), odd(scale), None, None, None, "mxfp8_e4m3", 96, 50), expected)


def chosen(format: str, *, rows: int = 64, dtype: torch.dtype = BF16, packed: bool = True) -> table.Explanation:
    return table.explain_call("linear_coded", CodedCall("cpu", "amx", dtype, rows, 256, 512, format, packed))


@pytest.mark.parametrize("format", [*FORMATS, "fp6_e3m2:64"])
def test_tiles_take_many_rows_of_bf16_against_floats(format: str) -> None:
    assert chosen(format).kernel == chosen(format, packed=False).kernel == "float-linear-amx"
    for changed, reason in (
        (chosen(format, rows=15), "15 rows do not fill a tile"),
        (chosen(format, dtype=torch.float32), "x is torch.float32"),
    ):
        assert changed.kernel != "float-linear-amx"
        assert reason in dict(changed.passed_over)["float-linear-amx"]


@pytest.mark.parametrize("format", ["int4:32", "int8:row", "ternary", "fp4_e2m1:row", "int4:32:asym", "fp6_e2m3:128"])
def test_what_is_the_same_in_integers_everywhere_stays_in_integers(format: str) -> None:
    explained = chosen(format)
    assert explained.kernel == "int-linear-amx"
    assert "computed in integers" in dict(explained.passed_over)["float-linear-amx"]


def test_the_scale_of_a_column_multiplies_x_first() -> None:
    explained = chosen("nf4:column", packed=False)
    assert explained.kernel == "float-linear-avx512_vbmi"
    assert "scale of a column" in dict(explained.passed_over)["float-linear-amx"]


def test_tiles_take_many_rows_of_bf16_against_bf16() -> None:
    def explained(rows: int, dtype: torch.dtype = BF16, weight_dtype: torch.dtype = BF16) -> table.Explanation:
        return table.explain_call("linear_dense", DenseCall("cpu", "amx", dtype, weight_dtype, rows, 256, 512))

    for rows in (16, 512, 4096):
        assert explained(rows).kernel == "dense-linear-amx"
    for refused, reason in (
        (explained(15), "15 rows do not fill a tile"),
        (explained(64, torch.float32), "these are torch.float32 and torch.bfloat16"),
        (explained(64, BF16, torch.float16), "these are torch.bfloat16 and torch.float16"),
    ):
        assert refused.kernel != "dense-linear-amx"
        assert reason in dict(refused.passed_over)["dense-linear-amx"]
