"""The dispatch table as data, and explain on what a person holds."""

import importlib
import pkgutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.kernels.cast.test_triton import COMPARED
from tests.laws.kernel_laws import KernelLaws

import parco.kernels
from parco import machine, nn
from parco.kernels import loss, table
from parco.kernels.linear.coded import CodedCall
from parco.kernels.linear.dense import DenseCall
from parco.products import Activations
from parco.training import products
from parco.weights import Quantized


class Case(NamedTuple):
    device: str
    isa: str


def run() -> torch.Tensor:
    return torch.zeros(())


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> table.Operation:
    monkeypatch.setattr(table, "_operations", {})
    made = table.Operation(
        "made",
        Case,
        (
            table.Kernel("made-amx", "amx", run),
            table.Kernel("made-avx2", "avx2", run, lambda call: "it is Sunday"),
            table.Kernel("made-generic", "generic", run),
            table.Kernel("made-torch", table.TORCH, run),
        ),
    )
    table.register(made)
    table.choose.cache_clear()
    yield made
    table.choose.cache_clear()


def test_the_first_that_can_is_chosen_and_every_better_one_has_a_reason(operation: table.Operation) -> None:
    explanation = table.explain_call("made", Case("cpu", "avx2"))
    assert explanation.kernel == "made-generic"
    reasons = dict(explanation.passed_over)
    assert "amx" in reasons["made-amx"]
    assert reasons["made-avx2"] == "it is Sunday"


def test_other_devices_get_the_reference(operation: table.Operation) -> None:
    explanation = table.explain_call("made", Case("cuda", "amx"))
    assert explanation.kernel == "made-torch"
    assert all("cuda" in reason for _, reason in explanation.passed_over)


def test_a_name_is_taken_once_and_a_list_ends_with_the_reference(operation: table.Operation) -> None:
    with pytest.raises(ValueError, match="'made' is registered already"):
        table.register(operation)
    with pytest.raises(ValueError, match="must end with its reference"):
        table.register(table.Operation("headless", Case, operation.kernels[:-1]))


def test_an_unknown_operation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="linear_coded, linear_coded_int8, linear_dense"):
        table.explain("linear")


def best_for_a_row(operation: str, kind: str) -> str:
    """The best kernel of this kind that is none of tiles, which a row does not fill."""
    kernels = table.operations()[operation].kernels
    return next(
        kernel.name
        for kernel in kernels
        if kernel.name.startswith(kind) and kernel.isa != "amx" and machine.has(kernel.isa)
    )


def test_explains_a_weight_and_a_module() -> None:
    from parco import weights

    spec = weights.parse("quantized(int4:32, 64x96)")
    (explanation,) = table.explain(spec, rows=1, dtype=torch.bfloat16)
    assert explanation.operation == "linear_coded"
    assert explanation.kernel == best_for_a_row("linear_coded", "int-linear-")
    both = table.explain(weights.parse("lowrank(quantized(int8:row, 64x16), dense(bf16, 16x96))"))
    assert [part.operation for part in both] == ["linear_chain", "linear_dense", "linear_coded"]
    (int8,) = table.explain(spec, rows=1, product=Activations())
    assert int8.kernel == best_for_a_row("linear_coded_int8", "int8-linear-")
    held = nn.StoredWeight.empty(spec, device="meta")
    held.product = Activations()
    assert table.explain(nn.Linear(held), rows=1) == (int8,)
    with pytest.raises(TypeError, match="neither"):
        table.explain(3)


@pytest.mark.parametrize(
    ("isa", "format", "rows", "kernel", "element"),
    [
        ("generic", "int4:32", 64, "int8-linear-generic", "int16"),
        ("avx2", "int4:32", 64, "int8-linear-avx2", "int16"),
        ("avx512", "int4:32", 9, "int8-linear-avx512", "int8"),
        ("avx512", "int4:32", 8, "int8-linear-avx512", "int16"),
        ("avx512", "int8:row", 64, "int8-linear-avx512", "int16"),
        ("avx512_vbmi", "int8:row", 1, "int8-linear-avx512_vbmi", "int8"),
        ("amx", "int8:row", 64, "int8-linear-amx", "int8"),
        ("amx", "int8:row", 0, "int8-linear-torch", "fp32"),
    ],
)
def test_what_products_with_int8_multiply(isa: str, format: str, rows: int, kernel: str, element: str) -> None:
    call = CodedCall("cpu", isa, torch.bfloat16, rows, 64, 256, format, int8=True)
    explained = table.explain_call("linear_coded_int8", call)
    assert (explained.kernel, table.element_of(explained)) == (kernel, element)


@pytest.mark.parametrize(
    ("isa", "format", "kernel", "element"),
    [
        ("generic", "int4:32", "int-linear-generic", "int16"),
        ("avx512_vbmi", "int4:32", "int-linear-avx512_vbmi", "int16"),
        ("amx", "int4:32", "int-linear-amx", "int8"),
        ("amx", "fp8_e4m3:row", "float-linear-amx", "bf16"),
        ("avx512", "fp8_e4m3:row", "float-linear-avx512", "fp32"),
    ],
)
def test_what_products_with_codes_multiply(isa: str, format: str, kernel: str, element: str) -> None:
    explained = table.explain_call("linear_coded", CodedCall("cpu", isa, torch.bfloat16, 64, 64, 256, format))
    assert (explained.kernel, table.element_of(explained)) == (kernel, element)


@pytest.mark.parametrize(
    ("isa", "rows", "kernel", "element"),
    [
        ("avx512", 1, "dense-linear-avx512", "fp32"),
        ("avx512", 16, "dense-linear-torch-native", "bf16"),
        ("amx", 16, "dense-linear-amx", "bf16"),
    ],
)
def test_what_dense_products_multiply(isa: str, rows: int, kernel: str, element: str) -> None:
    call = DenseCall("cpu", isa, torch.bfloat16, torch.bfloat16, rows, 64, 256)
    explained = table.explain_call("linear_dense", call)
    assert (explained.kernel, table.element_of(explained)) == (kernel, element)


def test_a_level_above_amx_has_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ISAS", (*machine.ISAS, "beyond"))
    monkeypatch.setattr(machine, "isa", lambda: "beyond")
    for rows, kernel in ((16, "dense-linear-amx"), (8, "dense-linear-torch-native")):
        call = DenseCall("cpu", "beyond", torch.bfloat16, torch.bfloat16, rows, 64, 256)
        explained = table.explain_call("linear_dense", call)
        assert explained.kernel == kernel
    assert dict(explained.passed_over)["dense-linear-avx512"] == "torch multiplies bfloat16 in AMX tiles"
    assert products.has_tiles(torch.device("cpu"))
    assert loss._operand(torch.ones(2, 2), torch.bfloat16).dtype == torch.bfloat16
    fp16 = DenseCall("cpu", "beyond", torch.float16, torch.float16, 2048, 64, 256)
    assert table.choose("linear_dense", fp16).name == "dense-linear-torch-native"


def test_every_operation_is_under_the_laws() -> None:
    for module in pkgutil.walk_packages(parco.kernels.__path__, "parco.kernels."):
        importlib.import_module(module.name)
    here = Path(__file__).parent
    for file in sorted(here.glob("*/test_*.py")):
        importlib.import_module(f"tests.kernels.{file.parent.name}.{file.stem}")
    assert set(table.operations()) <= {name for laws in KernelLaws.__subclasses__() for name in operations(laws)}


def operations(laws: type[KernelLaws]) -> set[str]:
    """The operations of these laws and of those made from them."""
    own = {laws.operation} if hasattr(laws, "operation") else set[str]()
    return own.union(*map(operations, laws.__subclasses__()))


def test_an_embedding_is_explained_by_its_lookup() -> None:
    spec = Quantized("int4:32", (64, 96))
    held = nn.StoredWeight.empty(spec, device="meta")
    (looked_up,) = parco.explain(nn.Embedding(held), rows=3)
    assert looked_up.operation == "embedding_coded"
    (multiplied,) = parco.explain(nn.Linear(held), rows=3)
    assert multiplied.operation == "linear_coded"
    (looked_up,) = parco.explain(nn.Embedding(nn.StoredWeight.empty(Quantized("nf4:32", (64, 96)), device="meta")))
    assert looked_up.kernel == "coded-embedding-generic"


def test_seeds_are_no_part_of_what_is_remembered() -> None:
    """Stochastic casts draw new ones in every step, and would push out everything else."""
    x = torch.randn(4, 64)
    scale = torch.ones(4, 2, dtype=torch.uint8)
    table._settled.clear()
    for seed in range(20):
        torch.ops.parco.cast_rows(x, None, "mxfp4", "stochastic", seed)
        torch.ops.parco.cast_codes(x, scale, None, None, "mxfp4", "stochastic", seed)
        torch.ops.parco.cast_both(x, None, None, "mxfp4", "stochastic", seed, True, False, 16, 0, seed)
    assert len(table._settled) == 3


def test_every_kernel_in_triton_is_compared_with_its_reference() -> None:
    known = {
        kernel.name for each in table.operations().values() for kernel in each.kernels if kernel.isa == table.TRITON
    }
    assert known == COMPARED
