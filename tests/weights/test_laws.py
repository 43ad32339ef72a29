import inspect

from tests.laws.weight_laws import WeightLaws

from parco import formats
from parco.weights import (
    Bitmap,
    BlockSparse,
    Dense,
    LowRank,
    Quantized,
    Rotated,
    Scaled,
    SemiSparse,
    Shared,
    Sum,
    Weight,
)


def rank(shape):
    return max(1, min(shape) // 2)


def low_rank(shape, form):
    left, right = (shape[0], rank(shape)), (rank(shape), shape[1])
    if form in ("fp32", "bf16"):
        return LowRank(Dense(left, form), Dense(right, form))
    return LowRank(Quantized(form, left), Quantized(form, right))


def blocks(form, shape, size):
    return BlockSparse(form, shape, size, max(1, shape[1] // size // 2))


def scaled(inner, form):
    return Scaled(inner, Dense((1, inner.shape[1]), form))


# Of the formats with a name one of each kind of scale and element, and what has no name but its own way through.
QUANTIZED = [
    "int8:row", "int8:128", "int8:tensor", "int4:tensor:asym", "int7:64:fp32",
    "int4:32", "int4:row", "int4:32:asym", "int3:64",
    "int2:16:fp16", "int4:1",
    "nf4:64", "fp8_e4m3", "ternary", "ternary:32", "fp8_e4m3:row", "fp8_e5m2:1x128", "fp8_e4m3:128x128", "mxfp8_e4m3",
    "ternary5", "ternary5:row", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4:floor", "nvfp4",
]  # fmt: skip
MAKERS = {
    **{form: lambda shape, form=form: Dense(shape, form) for form in ("fp32", "bf16", "fp16")},
    **{form: lambda shape, form=form: Quantized(form, shape) for form in QUANTIZED},
    "lowrank fp32": lambda shape: low_rank(shape, "fp32"),
    "lowrank int8": lambda shape: low_rank(shape, "int8:row"),
    "lowrank mixed": lambda shape: LowRank(
        Dense((shape[0], rank(shape)), "bf16"), Quantized("int4:32", (rank(shape), shape[1]))
    ),
    "shared": lambda shape: Shared(Quantized("int8:row", shape)),
    "joint": lambda shape: LowRank(
        Dense((shape[0], rank(shape)), "bf16"), Shared(Dense((rank(shape), shape[1]), "bf16"))
    ),
    "joint int8": lambda shape: LowRank(
        Quantized("int8:row", (shape[0], rank(shape))), Shared(Quantized("int8:row", (rank(shape), shape[1])))
    ),
    "corrected": lambda shape: Sum(Quantized("int4:32", shape), low_rank(shape, "bf16")),
    "corrected ternary5": lambda shape: Sum(Quantized("ternary5", shape), low_rank(shape, "bf16")),
    "sum of three": lambda shape: Sum(Dense(shape, "fp32"), Quantized("int8:row", shape), low_rank(shape, "int8:row")),
    "scaled int8": lambda shape: scaled(Quantized("int8:row", shape), "fp32"),
    "scaled int4": lambda shape: scaled(Quantized("int4:32", shape), "bf16"),
    "scaled and corrected": lambda shape: scaled(Sum(Quantized("int4:32", shape), low_rank(shape, "int8:row")), "fp16"),
    "rotated int4": lambda shape: Rotated(Quantized("int4:32", shape)),
    "rotated int8": lambda shape: Rotated(Quantized("int8:row", shape), seed=7),
    "scaled and rotated": lambda shape: scaled(Rotated(low_rank(shape, "bf16")), "bf16"),
    **{
        f"semisparse {form}": lambda shape, form=form: SemiSparse(form, shape)
        for form in ("bf16", "int8:row", "int4:32")
    },
    **{
        f"bitmap {form}": lambda shape, form=form: Bitmap(form, shape, -(-shape[1] // 2))
        for form in ("fp32", "fp16", "int8:row", "int4:32:asym", "ternary5:row")
    },
    "blocksparse bf16": lambda shape: blocks("bf16", shape, 16),
    "blocksparse int8:row": lambda shape: blocks("int8:row", shape, 32),
    "blocksparse nvfp4": lambda shape: blocks("nvfp4", shape, 64),
    "sparse and low rank": lambda shape: Sum(Bitmap("int8:row", shape, -(-shape[1] // 3)), low_rank(shape, "bf16")),
}


class TestWeights(WeightLaws):
    makers = MAKERS


def kinds(spec):
    return {type(spec)}.union(*map(kinds, spec.parts().values()))


def concrete(weight):
    found = set().union(*map(concrete, weight.__subclasses__()))
    return found if inspect.isabstract(weight) else {weight} | found


def test_every_weight_is_under_the_laws():
    made = set().union(
        *(kinds(make(laws.small)) for laws in WeightLaws.__subclasses__() for make in laws.makers.values())
    )
    assert {weight for weight in concrete(Weight) if weight.__module__.startswith("parco.")} <= made


def test_every_kind_of_format_is_under_the_laws():
    def kind(format):
        return type(format.element), format.per_byte, type(format.scale)

    stored = [form for name in formats.NAMES if not (form := formats.parse(name)).is_dense]
    kinds = {kind(form) for form in stored if not isinstance(form.scale, formats.ScaleDelayed)}
    assert kinds <= {kind(formats.parse(name)) for name in QUANTIZED}
    assert {form.element for form in stored if isinstance(form.element, formats.Float)} <= {
        formats.parse(name).element for name in QUANTIZED
    }
