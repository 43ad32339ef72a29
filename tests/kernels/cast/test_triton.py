"""The casts in Triton write the bits of the references: on a GPU where there is one, else in Triton's interpreter, and
they compile for GPUs that are not there.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.cast import test_both, test_kernels
from torch import Tensor

from parco import formats, kernels
from parco.kernels import table
from parco.kernels.cast import ROUNDINGS, Hadamard, encode_both
from parco.kernels.cast.decoding import DecodeCall
from parco.kernels.cast.scaling import rule
from parco.kernels.cast.triton import launch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which the interpreter computes with

COMPARED = {"cast-rows-triton", "cast-triton", "cast-both-triton", "decode-triton"}
"""Kernels that the tests below compare with their references."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = test_kernels.DTYPES
CAST = [
    *(
        "int2:32",
        "int3:64",
        "int4:1",
        "int7:32",
        "int8:row",
        "int4:32:fp32",
        "int4:128:fp16",
        "fp8_e4m3:row",
        "fp8_e5m2:1x128",
    ),
    *("mxfp8_e4m3", "mxfp8_e5m2:floor", "mxfp6_e2m3:even", "mxfp6_e3m2:ceil", "mxfp4", "nvfp4"),
]
GIVEN = ["int4:32:asym", "int5:64:asym", "ternary", "int8:column", "fp8_e4m3", "fp8_e4m3:128x128:pow2", "nvfp4:16x16"]
DECODED = [*CAST, *GIVEN, "nf4:64", "int8:column:asym", "int5:48:asym"]


def reference(operation: str) -> Callable[..., Any]:
    return table.operations()[operation].kernels[-1].run


def moved(*arguments: Any) -> tuple[Any, ...]:
    return tuple(each.to(DEVICE) if isinstance(each, Tensor) else each for each in arguments)


def assert_same(found: Any, wanted: Any) -> None:
    for one, other in zip(*([each] if isinstance(each, Tensor) else each for each in (found, wanted)), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CAST)
def test_rows_have_the_scales_and_codes_of_the_reference(name: str) -> None:
    for turn, (rows, columns) in enumerate(((5, 300), (1, 17), (9, 513), (0, 40))):
        dtype = DTYPES[turn % 3]
        assert launch.refuses_rows(name, dtype, columns) is None
        x = test_kernels.sample(rows, columns, dtype) if rows else torch.zeros(0, columns, dtype=dtype)
        if rows > 2:
            x[2], x[1] = 0, x[1] * 1e-30
        if rows:
            x = torch.nan_to_num(x, nan=0.0, posinf=float("inf"), neginf=-float("inf"))
            x[0, columns // 2] = float("nan")
        factor = torch.tensor([0.0017]) if name == "nvfp4" else None
        call = (x, factor, name, ROUNDINGS[turn % 3], 11 - 2**63)
        assert_same(launch.cast_rows(*moved(*call)), reference("cast_rows")(*call))


def test_the_largest_and_least_magnitudes_have_the_scales_of_the_reference() -> None:
    bits = torch.arange(0, 255, dtype=torch.int32)[:, None] << 23
    ends = torch.cat([bits, bits + 1, bits + 0x3FFFFF, bits + 0x400000, bits + 0x600000, bits + 0x7FFFFF], 1)
    x = torch.zeros(255 * 6, 32)
    x[:, 7] = ends.reshape(-1).view(torch.float32)
    for name in ("mxfp8_e4m3", "mxfp4:even", "mxfp6_e3m2:ceil", "mxfp8_e5m2:floor", "nvfp4", "int8:row", "int4:32"):
        call = (x, torch.tensor([2.0**-117]) if name == "nvfp4" else None, name, "nearest", 0)
        assert_same(launch.cast_rows(*moved(*call)), reference("cast_rows")(*call))


@pytest.mark.parametrize("name", [*GIVEN, "int3:64", "mxfp6_e2m3", "nvfp4", "fp8_e5m2:tensor:delayed", "int4:32:fp32"])
def test_codes_under_given_scales_are_those_of_the_reference(name: str) -> None:
    for turn, (rows, columns) in enumerate(((5, 300), (1, 17), (40, 513))):
        x = test_kernels.sample(rows, columns, DTYPES[turn % 3])
        call = (x, *test_kernels.scales_of(x, name), name, ROUNDINGS[(turn + 1) % 3], 3)
        assert launch.refuses_codes(name, x.dtype) is None
        assert_same(launch.cast_codes(*moved(*call)), reference("cast_codes")(*call))


@pytest.mark.parametrize("name", [name for name in CAST if (formats.parse(name).block.columns or 256) <= 128])
def test_both_ways_are_those_of_the_reference(name: str) -> None:
    for turn, (rows, columns) in enumerate(((33, 160), (70, 17), (128, 256))):
        size = (32, 16, 64)[turn]
        straight, transposed = ((True, True), (False, True), (True, False))[turn]
        x = test_both.sample(rows, columns, DTYPES[turn])
        sizes = [size if length % size == 0 else 0 for length in (columns, rows)]
        scales = (test_both.factor(name) if straight else None, test_both.factor(name, 0.02) if transposed else None)
        call = (x, *scales, name, ROUNDINGS[turn % 3], 5, straight, transposed, *sizes, 9 - 2**62)
        assert launch.refuses_both(name, x.dtype) is None
        assert_same(launch.cast_both(*moved(*call)), reference("cast_both")(*call))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_transforms_of_every_size_are_the_references(size: int) -> None:
    call = (test_both.sample(128, 256, torch.bfloat16), None, None, "mxfp4", "nearest", 0, True, True, size, size, 3)
    assert_same(launch.cast_both(*moved(*call)), reference("cast_both")(*call))


@pytest.mark.parametrize("name", DECODED)
def test_numbers_of_codes_are_those_of_the_reference(name: str) -> None:
    """All bytes as codes and scales: NaN, infinities and scales that no encoding gives among them."""
    generator = torch.Generator().manual_seed(5)
    for turn, (rows, columns) in enumerate(((5, 300), (1, 17), (40, 517))):
        tensors = {}
        for tensor, spec in formats.parse(name).tensors((rows, columns)).items():
            raw = torch.randint(0, 256, (*spec.shape, spec.dtype.itemsize), generator=generator, dtype=torch.uint8)
            tensors[tensor] = raw.view(spec.dtype)[..., 0]
            if tensor != "codes" and spec.dtype != torch.uint8:
                tensors[tensor] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
        given = [tensors.get(part) for part in ("codes", "scale", "zero", "global_scale")]
        call = (*given, name, columns, DTYPES[turn])
        assert_same(launch.decode_codes(*moved(*call)), reference("decode_codes")(*call))


def test_what_is_left_to_the_reference_has_a_reason() -> None:
    assert launch.refuses_rows("int8:row", torch.bfloat16, 1 << 15) is None
    assert "one program holds 32768" in str(launch.refuses_rows("int8:row", torch.bfloat16, (1 << 15) + 1))
    assert "groups of 48" in str(launch.refuses_rows("int8:48", torch.bfloat16, 96))
    assert launch.refuses_rows("int8:48", torch.bfloat16, 40) is None
    assert "table" in str(launch.refuses_codes("nf4:64", torch.float32))
    assert "5 digits to a byte" in str(launch.refuses_codes("ternary5", torch.float32))
    decode = next(k for k in table.operations()["decode_codes"].kernels if k.isa == table.TRITON)
    assert "5 digits" in str(decode.refuses(DecodeCall("cuda", "generic", torch.float32, 1, 5, "ternary5")))
    assert "float64" in str(launch.refuses_codes("int4:32", torch.float64))
    assert "128" in str(launch.refuses_both("int8:256", torch.float32))
    assert "a whole row" in str(launch.refuses_both("int8:row", torch.float32))


def test_calls_on_cuda_come_to_triton() -> None:
    """As `explain` says of calls there; each kernel is an operation's last before its reference."""
    for operation in ("cast_rows", "cast_codes", "cast_both", "decode_codes"):
        of_triton, last = table.operations()[operation].kernels[-2:]
        assert (of_triton.isa, last.isa) == (table.TRITON, table.TORCH)
    x = torch.zeros(4, 64)
    described = kernels.cast.rows.describe(x, None, "mxfp4", "nearest", 0)
    explained = table.explain_call("cast_rows", described._replace(device="cuda"))
    assert explained.kernel == "cast-rows-triton"
    assert all("on cuda" in reason for _, reason in explained.passed_over)
    explained = table.explain_call("cast_rows", described._replace(device="cuda", format="int4:48"))
    assert explained.kernel == "cast-rows-torch" and "groups of 48" in explained.passed_over[-1][1]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("parco::cast_rows", "CUDA")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_operations_on_cuda_give_the_numbers_of_the_cpu() -> None:
    x = torch.randn(256, 512)
    for name in ("nvfp4", "mxfp8_e4m3", "int8:row"):
        options = {"rounding": "stochastic", "seed": 5, "hadamard": Hadamard(16, 7)}
        for found, wanted in zip(encode_both(x.cuda(), name, **options), encode_both(x, name, **options), strict=True):
            assert all(torch.equal(found.tensors[part].cpu(), tensor) for part, tensor in wanted.tensors.items())


COMPILE = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from parco.kernels.cast.triton import launch


class Driver:
    # A GPU that is not there.
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(kernel, *arguments, grid, warmup, **options):
    made.append(run(kernel, *arguments, grid=grid, warmup=True, **options))


made, run = [], JITFunction.run
JITFunction.run = compiled
driver.set_active(Driver())
capability = 80
bf16 = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
launch.cast_rows(bf16(64, 512), torch.ones(1), "nvfp4", "stochastic", 3)
launch.decode_codes(*launch.cast_rows(bf16(5, 96), None, "mxfp6_e2m3", "nearest", 3), None, None, "mxfp6_e2m3", 96,
                    torch.bfloat16)
capability = 90
launch.cast_rows(torch.zeros(2, 5000), None, "int8:row", "stochastic", 2**63 - 1)
scale, zero = torch.zeros(64, 8, dtype=torch.bfloat16), torch.zeros(64, 8, dtype=torch.uint8)
launch.cast_codes(bf16(64, 512), scale, zero, None, "int5:64:asym", "nearest", 0)
capability = 100
launch.cast_both(bf16(64, 512), None, None, "mxfp8_e4m3", "nearest", -1, True, True, 0, 16, 5)
for kernel in made:
    assert kernel.asm["cubin"]
    for inexact in ("fma.rn.f32", "div.full", "div.approx", ".ftz"):
        assert inexact not in kernel.asm["ptx"], (kernel.name, inexact)
kinds = len(made)
launch.cast_both(bf16(4000, 512), None, None, "mxfp8_e4m3", "nearest", 2**40, True, True, 0, 16, 5)
assert kinds == 6 and made[-1] is made[-2], "another seed or height is another kernel"
"""


def test_every_kernel_compiles_as_it_is_launched_without_inexact_instructions(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    made = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]


def test_every_format_that_is_cast_by_rows_is_tried() -> None:
    """Every rule by which scales are found, each width of codes, and each type of scale."""
    known = [formats.parse(name) for name in formats.NAMES if rule(formats.parse(name)) is not None]
    cast = [form for form in known if launch.refuses_codes(str(form), torch.float32) is None]
    tried = [formats.parse(name) for name in CAST]
    assert {rule(form) for form in cast} <= {rule(form) for form in tried}
    assert {type(form.scale) for form in cast} <= {type(form.scale) for form in tried}
