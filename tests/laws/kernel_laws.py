"""The laws of an operation of the dispatch table. A test class inherits them and supplies `operation`, the name in
`parco.kernels.table`, and the fixture `call`, example arguments for `torch.ops.parco.<operation>`:

class TestMine(KernelLaws):
    operation = "mine"

    @pytest.fixture(params=[...])
    def call(self, request):
        return (torch.randn(3, 8), ...)
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from parco import machine
from parco.kernels import table
from parco.kernels.linear.launches import launches


def several(result: Any) -> tuple[torch.Tensor, ...]:
    """What an operation returned as a tuple, of one tensor or more."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def is_float(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def derivatives(results: Sequence[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the sum of their squares that can be differentiated again."""
    total = sum((each.float().square().sum() for each in results), torch.zeros(()))
    if not total.requires_grad:
        return []
    found = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    return [each for each in found if each is not None and each.requires_grad]


def forget_choices() -> None:
    """What is remembered of instruction sets and of kernels chosen for them."""
    machine.isa.cache_clear()
    table.choose.cache_clear()
    table._settled.clear()
    launches.clear()


def each_isa(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set of this machine, in force until the next one is asked for."""
    try:
        for isa in machine.detect().isas:
            monkeypatch.setenv("PARCO_ISA", isa)
            forget_choices()
            yield isa
    finally:
        monkeypatch.delenv("PARCO_ISA")
        forget_choices()


def telling(kernel: table.Kernel, names: list[str]) -> Callable[..., Any]:
    """`kernel.run`, which puts the kernel's name on the list."""

    def run(*arguments: Any) -> Any:
        names.append(kernel.name)
        return kernel.run(*arguments)

    return run


class KernelLaws:
    operation: str

    def overload(self) -> Any:
        return getattr(torch.ops.parco, self.operation).default

    def test_opcheck(self, call: tuple[Any, ...]) -> None:
        """Schema, fake implementation, derivative and tracing agree with what runs."""
        torch.library.opcheck(self.overload(), call)

    def test_a_second_derivative_is_never_silently_zero(self, call: tuple[Any, ...]) -> None:
        """As it is where backward is made of an operation that has no derivative of its own: PyTorch only warns."""
        given = [each.detach().requires_grad_() if is_float(each) else each for each in call]
        leaves = [each for each in given if is_float(each)]
        results = [each for each in several(self.overload()(*given)) if each.requires_grad] if leaves else []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = derivatives(results, leaves)
            if said or not found:
                pytest.skip("it has no derivative")
            with contextlib.suppress(RuntimeError):  # it is refused
                derivatives(found, leaves)
            assert not said, said[0].message

    def test_the_reference_ends_the_list_and_refuses_nothing(self, call: tuple[Any, ...]) -> None:
        operation = table.operations()[self.operation]
        reference = operation.kernels[-1]
        assert reference.isa == table.TORCH
        assert reference.refuses(operation.describe(*call)) is None

    def test_every_usable_kernel_returns_what_the_reference_does(self, call: tuple[Any, ...]) -> None:
        operation = table.operations()[self.operation]
        expected = several(operation.kernels[-1].run(*call))
        described = operation.describe(*call)
        ran = 0
        for kernel in operation.kernels[:-1]:
            usable = kernel.isa == table.TORCH or kernel.isa in machine.detect().isas
            if not usable or kernel.refuses(described):
                continue
            for found, wanted in zip(several(kernel.run(*call)), expected, strict=True):
                assert found.dtype == wanted.dtype, kernel.name
                assert found.shape == wanted.shape, kernel.name
                self.assert_agrees(found, wanted, call, kernel.name)
            ran += 1
        on_cpu = {kernel.isa for kernel in operation.kernels[:-1]} - {table.TRITON}
        assert ran >= 1 or not on_cpu & {table.TORCH, *machine.detect().isas}, "the machine has none of its levels"

    def assert_agrees(self, found: torch.Tensor, expected: torch.Tensor, call: tuple[Any, ...], name: str) -> None:
        torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")

    def test_a_forced_instruction_set_is_the_one_that_runs(
        self, call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The operation itself is called, with every kernel of the table replaced by one that tells its name."""
        operation = table.operations()[self.operation]
        ran: list[str] = []
        spies = tuple(replace(kernel, run=telling(kernel, ran)) for kernel in operation.kernels)
        monkeypatch.setitem(table._operations, self.operation, replace(operation, kernels=spies))
        try:
            for isa in machine.detect().isas:
                monkeypatch.setenv("PARCO_ISA", isa)
                forget_choices()
                described = operation.describe(*call)
                allowed = machine.ISAS[: machine.ISAS.index(isa) + 1]
                best = next(
                    kernel
                    for kernel in operation.kernels
                    if (kernel.isa in allowed or kernel.isa == table.TORCH) and not kernel.refuses(described)
                )
                ran.clear()
                self.overload()(*call)
                assert ran == [best.name]
        finally:
            monkeypatch.undo()
            forget_choices()

    def test_explain_names_the_choice_and_what_was_passed_over(self, call: tuple[Any, ...]) -> None:
        (explanation,) = table.explain(self.operation, *call)
        kernels = [kernel.name for kernel in table.operations()[self.operation].kernels]
        position = kernels.index(explanation.kernel)
        assert [name for name, _ in explanation.passed_over] == kernels[:position]
        assert all(reason for _, reason in explanation.passed_over)
        assert all(name in str(explanation) for name in kernels[: position + 1])
