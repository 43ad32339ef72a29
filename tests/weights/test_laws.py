import pytest
from tests.laws.weight_laws import WeightLaws

from parco.weights import Dense, LowRank, Quantized, Sum


def rank(shape):
    return max(1, min(shape) // 2)


def low_rank(shape, form):
    left, right = (shape[0], rank(shape)), (rank(shape), shape[1])
    if form in ("fp32", "bf16"):
        return LowRank(Dense(left, form), Dense(right, form))
    return LowRank(Quantized(form, left), Quantized(form, right))


QUANTIZED = [
    "int8:row", "int8:128", "int8:tensor", "int4:tensor:asym", "int7:64:fp32",
    "int4:32", "int4:row", "int4:32:asym", "int3:64",
    "int2:16:fp16",
    "nf4:64", "ternary", "ternary:32", "fp8_e4m3:row", "fp8_e5m2:1x128", "fp8_e4m3:128x128", "mxfp8_e4m3",
    "mxfp6_e2m3", "mxfp4:floor", "nvfp4",
]  # fmt: skip
MAKERS = {
    **{form: lambda shape, form=form: Dense(shape, form) for form in ("fp32", "bf16", "fp16")},
    **{form: lambda shape, form=form: Quantized(form, shape) for form in QUANTIZED},
    "lowrank fp32": lambda shape: low_rank(shape, "fp32"),
    "lowrank int8": lambda shape: low_rank(shape, "int8:row"),
    "lowrank mixed": lambda shape: LowRank(
        Dense((shape[0], rank(shape)), "bf16"), Quantized("int4:32", (rank(shape), shape[1]))
    ),
    "corrected": lambda shape: Sum(Quantized("int4:32", shape), low_rank(shape, "bf16")),
    "sum of three": lambda shape: Sum(Dense(shape, "fp32"), Quantized("int8:row", shape), low_rank(shape, "int8:row")),
}


class TestWeights(WeightLaws):
    @pytest.fixture(params=MAKERS)
    def make(self, request):
        return MAKERS[request.param]
