"""Methods: their text, their algebra, and the law that what is made is what was announced and what the solver
believed.
"""

import itertools

import pytest
import torch
from torch import Tensor

from parco.fitting.gptq import gptq, rtn
from parco.fitting.methods import (
    Corrected,
    Factor,
    Joint,
    Keep,
    Method,
    Prune,
    Quantize,
    QuantizedFactors,
    QuantizedPrune,
    Rotate,
    Scale,
    Transform,
    Transformed,
    output_error,
    parse,
)
from parco.fitting.search import IntegerGrid
from parco.fitting.statistics import Statistics
from parco.formats import parse as parse_format
from parco.weights import parse as parse_weight

TEXTS = [
    "keep",
    "bf16",
    "fp16",
    "int8:row",
    "int8:tensor",
    "int4:32",
    "int4:32@rtn",
    "int4:32@gptq",
    "int3:64:asym",
    "int2:32",
    "nf4:64",
    "mxfp4",
    "nvfp4",
    "fp8_e4m3:row",
    "fp8_e4m3:128x128",
    "ternary",
    "ternary5:row",
    "factor(0.5)",
    "factor(rank=20)",
    "factor(0.5,metric=plain)",
    "factor(rank=32,metric=activation,format=fp32)",
    "factor(0.5)>>int4:32",
    "factor(rank=24)>>int8:row@rtn",
    "int4:32+factor(rank=16)",
    "int3:32+factor(rank=16)>>int8:row",
    "factor(0.5,metric=scaled)",
    "factor(1)",
    "factor(0.1234567)",
    "joint(0.5)",
    "joint(0.3333333333333333)>>int8:row",
    "joint(rank=24,metric=plain)>>int8:row",
    "prune(2:4)",
    "prune(50%)",
    "prune(75%,score=magnitude,format=fp16)",
    "prune(50%,score=wanda)",
    "prune(block:16,score=sparsegpt)",
    "prune(block:32:75%)",
    "prune(2:4)>>int8:row",
    "prune(50%,score=magnitude)>>int4:32",
    "prune(block:16)>>nf4:64",
    "prune(50%)+factor(rank=16)",
    "prune(2:4)>>int8:row+factor(rank=16)>>int8:row",
    "int4:32@actorder",
    "int3:64:asym@actorder",
    "int8:row@actorder",
    "nvfp4@gptq",
    "mxfp4@actorder",
    "fp8_e4m3:128x128@gptq",
    "nf4:64@gptq",
    "scale",
    "scale>>int4:32",
    "scale(0.5)>>nvfp4",
    "scale(0.1234567)>>nvfp4",
    "scale(0.5,rule=smoothquant)>>int8:row",
    "scale(rule=smoothquant)>>int4:32@actorder",
    "scale>>prune(2:4)>>int8:row",
    "scale>>factor(0.5)>>int8:row",
    "scale>>int4:32+factor(rank=16)",
    "scale>>int4:32@rtn+factor(rank=16)>>int8:row",
    "rotate",
    "rotate>>int4:32",
    "rotate(3)>>mxfp4",
    "rotate>>factor(0.5)>>int8:row",
    "rotate>>int4:32+factor(rank=16)",
    "scale>>rotate>>int4:32",
]
NEEDS_STATISTICS = (
    "int4:32@gptq",
    "int4:32@actorder",
    "int3:64:asym@actorder",
    "int8:row@actorder",
    "nvfp4@gptq",
    "mxfp4@actorder",
    "fp8_e4m3:128x128@gptq",
    "nf4:64@gptq",
    "factor(rank=32,metric=activation,format=fp32)",
    "factor(0.5,metric=scaled)",
    "prune(50%,score=wanda)",
    "prune(block:16,score=sparsegpt)",
)
SHAPES = [(48, 96), (80, 50)]


def seen(columns: int) -> Statistics:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return Statistics.of(torch.randn(1200, columns, generator=generator) @ mix * torch.logspace(0, -1, columns))


def weights(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    method = parse(text)
    assert str(method) == text
    assert parse(str(method)) == method == Method.parse(text)
    assert hash(parse(text)) == hash(method)
    assert parse(method) is method


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_statistics", [False, True])
def test_what_is_made_is_what_was_announced(text: str, shape: tuple[int, int], with_statistics: bool) -> None:
    method, weight = parse(text), weights(shape)
    assert method.needs_inputs == (text in NEEDS_STATISTICS or text.startswith("scale"))
    if not with_statistics and method.needs_inputs:
        with pytest.raises(ValueError, match="needs statistics"):
            method(weight)
        return
    before = weight.clone()
    statistics = seen(shape[1]) if with_statistics else None
    spec, tensors = method(weight, statistics)
    assert spec == method.spec(shape, weight.dtype)
    assert parse_weight(str(spec)) == spec
    wanted = [(part.shape, part.dtype) for part in spec.tensors().values()]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == wanted
    assert sum(tensor.nbytes for tensor in tensors) == spec.nbytes
    assert torch.equal(weight, before), "the given matrix stays as it is"
    assert bool(torch.isfinite(spec.dense(*tensors)).all())
    again = method(weight, None if statistics is None else seen(shape[1]))[1]
    assert all(torch.equal(first, second) for first, second in zip(tensors, again, strict=True))


@pytest.mark.parametrize(
    "name", ["int2:32", "int3:64:asym", "int4:32", "int5:32", "int8:row", "int8:tensor", "int4:16"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_gives_what_the_solver_believed(name: str, shape: tuple[int, int]) -> None:
    weight, statistics = weights(shape), seen(shape[1])
    grid = IntegerGrid.of(parse_format(name))
    assert grid is not None
    for method, solved in (
        (Quantize(name, "gptq"), gptq(weight, statistics, grid)),
        (Quantize(name, "rtn"), rtn(weight, grid, statistics.diagonal)),
    ):
        spec, tensors = method(weight, statistics)
        assert torch.equal(spec.dense(*tensors), solved.dense())


def test_negative_scales_run_on_the_kernels() -> None:
    weight = weights((48, 96))
    spec, tensors = Quantize("int3:32")(weight, seen(96))
    assert bool((tensors[1] < 0).any()), "the search uses the extra negative code for positive extremes"
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(spec.apply(x, *tensors), x @ spec.dense(*tensors).T, rtol=1e-4, atol=1e-5)


def test_auto_is_gptq_where_inputs_were_seen() -> None:
    weight, statistics = weights((48, 96)), seen(96)
    automatic = Quantize("int4:32")(weight, statistics)[1]
    assert all(map(torch.equal, automatic, Quantize("int4:32", "gptq")(weight, statistics)[1]))
    assert all(map(torch.equal, Quantize("int4:32")(weight)[1], Quantize("int4:32", "rtn")(weight)[1]))
    empty = Statistics(torch.zeros(96, 96), 0)
    for solver in ("auto", "gptq"):
        unseen = Quantize("int4:32", solver)(weight, empty)[1]
        assert all(map(torch.equal, unseen, Quantize("int4:32")(weight)[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keep_keeps_the_numbers_and_their_dtype(dtype: torch.dtype) -> None:
    weight = weights((8, 16)).to(dtype)
    spec, (values,) = Keep()(weight)
    assert values.dtype == dtype
    assert torch.equal(values, weight)
    assert values.data_ptr() != weight.data_ptr()
    assert spec.nbytes == weight.nbytes


def test_half_precision_weights_are_solved_in_fp32() -> None:
    weight = weights((48, 96)).bfloat16()
    for text in ("int4:32", "factor(0.5)", "factor(0.5)>>int8:row", "int4:32+factor(rank=16)"):
        half, full = parse(text)(weight, seen(96))[1], parse(text)(weight.float(), seen(96))[1]
        assert all(map(torch.equal, half, full))


def test_output_error_is_measured_on_the_inputs() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(500, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight, statistics = weights((48, 96)), Statistics.of(inputs)
    for text in ("int3:32", "keep"):
        spec, tensors = parse(text)(weight, statistics)
        kept = [tensor.clone() for tensor in tensors]
        expected = (inputs @ (weight - spec.dense(*tensors)).T).square().mean(0)
        measured = output_error(weight, spec, tensors, statistics)
        torch.testing.assert_close(measured, expected, rtol=1e-2, atol=1e-5)
        unweighted = output_error(weight, spec, tensors)
        torch.testing.assert_close(unweighted, (weight - spec.dense(*tensors)).square().sum(1))
        assert all(map(torch.equal, kept, tensors)), "measuring changes nothing"


def test_a_correction_lowers_the_error_and_factors_in_few_bits_stay_close() -> None:
    weight, statistics = weights((80, 96)), seen(96)

    def total(text: str) -> float:
        return float(output_error(weight, *parse(text)(weight, statistics), statistics).sum())

    assert total("int3:32+factor(rank=16)") < 0.8 * total("int3:32")
    assert total("int3:32+factor(rank=16)>>int8:row") < 1.1 * total("int3:32+factor(rank=16)")
    assert total("factor(rank=32)>>int8:row") < 1.05 * total("factor(rank=32)")
    assert total("factor(rank=32)>>int4:32") < 1.2 * total("factor(rank=32)")
    assert total("factor(rank=32)") < 0.9 * total("factor(rank=32,metric=plain)")


def test_pruned_numbers_are_stored_and_corrected_in_either_order_of_writing() -> None:
    pruned, few, low = Prune("2:4"), Quantize("int8:row"), Factor(rank=16)
    assert (pruned >> few) + low == pruned >> (few + low) == parse("prune(2:4)>>int8:row+factor(rank=16)")
    assert parse("prune(50%)+factor(rank=16)>>int8:row") == Corrected(Prune("50%"), low >> few)  # pyright: ignore
    weight, statistics = weights((80, 96)), seen(96)

    def total(text: str) -> float:
        return float(output_error(weight, *parse(text)(weight, statistics), statistics).sum())

    assert total("prune(75%)+factor(rank=16)") < 0.9 * total("prune(75%)")
    assert total("prune(50%)>>int8:row") < 1.1 * total("prune(50%)")
    assert total("prune(50%)>>int4:32") < 1.5 * total("prune(50%)")


def test_algebra_builds_the_compositions() -> None:
    assert Factor(0.5) >> Quantize("int4:32") == QuantizedFactors(Factor(0.5), Quantize("int4:32"))
    assert Quantize("int4:32") + Factor(rank=32) == Corrected(Quantize("int4:32"), Factor(rank=32))
    in_bits = Quantize("int4:32") + (Factor(rank=32) >> Quantize("int8:row"))
    assert in_bits == (Quantize("int4:32") + Factor(rank=32)) >> Quantize("int8:row")
    assert in_bits == parse("int4:32+factor(rank=32)>>int8:row")


KINDS = [
    Keep(),
    Quantize("int4:32"),
    Factor(0.5),
    Factor(0.5) >> Quantize("int4:32"),
    Joint(Factor(0.5)),
    Quantize("int4:32") + Factor(rank=8),
    Prune("50%"),
    Prune("2:4") >> Quantize("int8:row"),
    Prune("50%") + Factor(rank=8),
    Scale(),
    Scale(0.5, "smoothquant") >> Quantize("int8:row"),
    Scale(0.5) >> (Quantize("int4:32") + Factor(rank=8)),
    Scale() >> Factor(0.5),
    Rotate(1),
    Rotate() >> Quantize("int4:32"),
]


def _is_stored(first: Method, second: Method) -> bool:
    if isinstance(first, Transform):
        begins = second.transform if isinstance(second, Transformed) else second
        return not isinstance(second, Keep | Joint) and type(begins) is not type(first)
    if isinstance(first, Transformed):
        return _is_stored(first.then, second)
    stored = isinstance(first, Factor | Joint | Prune | Corrected) and isinstance(second, Quantize)
    return stored or (isinstance(first, Prune) and isinstance(second, Corrected) and isinstance(second.base, Quantize))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_only_compositions_with_a_meaning_are_allowed(first: Method, second: Method) -> None:
    if not _is_stored(first, second):
        with pytest.raises(TypeError, match="factor"):
            _ = first >> second
    else:
        assert parse(f"{first}>>{second}") == first >> second
    if not (isinstance(first, Quantize | Prune | QuantizedPrune) and isinstance(second, Factor | QuantizedFactors)):
        with pytest.raises(TypeError, match="factor"):
            _ = first + second


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int9:32",
        "gguf",
        "factor",
        "factor()",
        "factor(0.5,0.5)",
        "factor(depth=3)",
        "factor(many)",
        "factor(rank=a)",
        "prune(score=wanda)",
        "prune(2:4,depth=3)",
        "scale()",
        "scale(0.5,0.5)",
        "rotate()",
        "rotate(1,seed=2)",
    ],
)
def test_unknown_methods_name_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"factor\(0\.5\)|ratio is a number such as 0\.5"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["keep>>int4:32", "factor(0.5)+int4:32", "int4:32+int4:32", "factor(0.5)>>factor(0.5)"]
)
def test_meaningless_compositions_are_value_errors_in_text(text: str) -> None:
    with pytest.raises(ValueError, match="factor"):
        parse(text)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="solver must be one of auto, rtn, gptq"):
        Quantize("int4:32", "best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="solver gptq has nothing to round in bf16"):
        Quantize("bf16", "gptq")
    with pytest.raises(ValueError, match="either ratio or rank"):
        Factor()
    with pytest.raises(ValueError, match="either ratio or rank"):
        Factor(0.5, rank=3)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        Factor(1.5)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Factor(rank=0)
    with pytest.raises(ValueError, match="metric must be one of"):
        Factor(0.5, metric="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"exponent must be in \[0, 1\]"):
        Scale(1.5)
    with pytest.raises(ValueError, match="rule must be one of awq, smoothquant"):
        Scale(rule="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="seed is a whole number"):
        parse("rotate(x)")
    with pytest.raises(ValueError, match="seed must lie in"):
        Rotate(-1)
    with pytest.raises(ValueError, match="exponent is a number"):
        parse("scale(much)")
    with pytest.raises(ValueError, match="for few bits"):
        Factor(0.5, format="int4:32")


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_weights_are_checked(method: Method) -> None:
    weight = weights((8, 16))
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        method(weight)
    with pytest.raises(ValueError, match="must be a matrix"):
        method(torch.zeros(4))
    with pytest.raises(ValueError, match="floating point"):
        method(torch.zeros(4, 4, dtype=torch.int32))
    if not isinstance(method, Keep):
        with pytest.raises(ValueError, match="16 columns, the statistics have 12"):
            method(weights((8, 16)), Statistics(torch.eye(12), 1))


def test_ridge_makes_the_rows_themselves_count() -> None:
    weight, statistics = weights((64, 96)), seen(96)
    head = Quantize("int3:32")(weight, statistics)
    both = Quantize("int3:32")(weight, statistics.with_ridge(1.0))
    assert output_error(weight, *both).sum() < output_error(weight, *head).sum()
    assert (
        output_error(weight, *both, statistics).sum()
        < output_error(weight, *Quantize("int3:32")(weight), statistics).sum()
    )
