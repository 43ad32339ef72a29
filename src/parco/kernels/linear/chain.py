"""linear_chain: y = x @ W.T + bias in one call where W is a sum of products of stored matrices, as a matrix of low
rank is, a quantized one and its correction, or a frozen one with LoRA's factors.

A *plan* says how the tensors make up W, such as "int4:32 4096x4096 + bf16 4096x16 * bf16 16x4096": terms, each a
product of factors, each a format and a shape; "by int8" after a factor says that what it multiplies is rounded to int8
first (`linear_coded_int8`). x goes through a term's factors from the last to the first and is rounded to x's dtype
between them, so that one term gives the bits of its products apart. Terms are added in fp32, the last one first, and
rounded once.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import _C, machine
from parco.formats import Format
from parco.kernels import table
from parco.kernels.cast import to_bits
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched
from parco.kernels.linear import coded, dense, int8, reference
from parco.kernels.linear.gradient import times_matrix
from parco.kernels.linear.launches import launches, remember
from parco.kernels.linear.panels import is_packed
from parco.kernels.linear.storage import check_tensors, settle, storage

NAME = "linear_chain"
STORED = ("codes", "scale", "zero", "global_scale")
"""The tensors of a factor: None for those that its format has not. A dense matrix stands first, alone."""


class Factor(NamedTuple):
    """One matrix of a plan, `outputs` by `columns`; `int8` where what it multiplies is rounded to int8 first."""

    format: str
    outputs: int
    columns: int
    int8: bool = False

    def __str__(self) -> str:
        return f"{self.format} {self.outputs}x{self.columns}{' by int8' if self.int8 else ''}"

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a dense matrix."""
        return _dense_dtype(self.format)

    @property
    def operation(self) -> Any:
        """The module of the operation that multiplies by it."""
        return dense if self.dtype is not None else int8 if self.int8 else coded

    def call(self, device: str, dtype: torch.dtype, rows: int, packed: bool) -> Any:
        """The key in that operation's table."""
        if self.dtype is not None:
            return dense.DenseCall(device, machine.isa(), dtype, self.dtype, rows, self.outputs, self.columns)
        shape = (rows, self.outputs, self.columns)
        return coded.CodedCall(device, machine.isa(), dtype, *shape, self.format, packed, self.int8)


Terms = tuple[tuple[Factor, ...], ...]
Own = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""A factor's tensors, those of STORED."""

_FACTOR = re.compile(r"(\S+) (\d+)x(\d+)( by int8)?")


@functools.cache
def _dense_dtype(format: str) -> torch.dtype | None:
    parsed = Format.parse(format)
    return parsed.tensors((1, 1))["values"].dtype if parsed.is_dense else None


@functools.cache
def _names(format: str) -> tuple[str, ...]:
    """The tensors that a factor has, in the order in which the operation takes them."""
    named = Format.parse(format).tensors((1, 1))
    return tuple(named) if "values" in named else tuple(name for name in STORED if name in named)


def text(terms: Sequence[Sequence[Factor]]) -> str:
    """The plan of these terms."""
    return " + ".join(" * ".join(map(str, term)) for term in terms)


@functools.cache
def parse(plan: str) -> Terms:
    """The terms of a plan. ValueError where it has none, or its shapes do not fit together."""

    def factor(part: str) -> Factor:
        match = _FACTOR.fullmatch(part)
        if match is None:
            raise ValueError(f"{NAME}: plan has the factor {part!r}; one like 'int4:32 64x96' is needed")
        found = Factor(match[1], int(match[2]), int(match[3]), match[4] is not None)
        if found.int8 and (found.dtype is not None or not storage(found.format).takes_int8):
            raise ValueError(f"{NAME}: plan has {part!r}; {found.format} does not multiply int8")
        return found

    terms = tuple(tuple(factor(part) for part in term.split(" * ")) for term in plan.split(" + "))
    for term in terms:
        for left, right in itertools.pairwise(term):
            if left.columns != right.outputs:
                raise ValueError(f"{NAME}: plan multiplies {left} by {right}; {left.columns} rows are needed")
        if (term[0].outputs, term[-1].columns) != (terms[0][0].outputs, terms[0][-1].columns):
            raise ValueError(f"{NAME}: plan adds up terms of several shapes: {plan}")
    return terms


def split(tensors: Sequence[Tensor], terms: Terms) -> list[list[tuple[Factor, Own]]]:
    """Every factor with its tensors. ValueError where there are more or fewer of these."""
    counts = [len(_names(factor.format)) for term in terms for factor in term]
    if len(tensors) != sum(counts):
        raise ValueError(f"{NAME}: {len(tensors)} tensors are given; the plan has {sum(counts)}: {text(terms)}")
    left = iter(tensors)

    def own(factor: Factor) -> Own:
        found = {name: next(left) for name in _names(factor.format)}
        first = found["values" if "values" in found else "codes"]
        return first, found.get("scale"), found.get("zero"), found.get("global_scale")

    return [[(factor, own(factor)) for factor in term] for term in terms]


class ChainCall(NamedTuple):
    """One call of linear_chain: `rows` x of `dtype`; `packed` says of each factor whether its codes are panels."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    plan: str
    packed: tuple[bool, ...]

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.dtype} x ({self.plan}), {torch.get_num_threads()} threads"

    def factors(self) -> Iterator[tuple[Factor, table.Kernel]]:
        """Every factor and the kernel that its operation would choose."""
        packed = iter(self.packed)
        for term in parse(self.plan):
            for factor in term:
                call = factor.call(self.device, self.dtype, self.rows, next(packed))
                yield factor, table.choose(factor.operation.NAME, call)


def describe(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> ChainCall:
    """The table's key of a call."""
    terms = parse(plan)
    packed = tuple(factor.dtype is None and is_packed(own[0]) for term in split(tensors, terms) for factor, own in term)
    return ChainCall(x.device.type, machine.isa(), x.dtype, x.numel() // terms[0][-1].columns, plan, packed)


def check(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float(NAME, "x", x)
    terms = parse(plan)
    outputs, columns = terms[0][0].outputs, terms[0][-1].columns
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"{NAME}: x has the shape {tuple(x.shape)}; its last dimension must be {columns}, as in {plan}"
        )
    for term in split(tensors, terms):
        for factor, own in term:
            if factor.dtype is None:
                check_tensors(NAME, factor.format, factor.columns, factor.outputs, dict(zip(STORED, own, strict=True)))
                continue
            matrix = own[0]
            if matrix.dtype != factor.dtype or tuple(matrix.shape) != (factor.outputs, factor.columns):
                raise ValueError(f"{NAME}: a matrix is {matrix.dtype} {tuple(matrix.shape)}; the plan has {factor}")
    if bias is not None:
        check_float(NAME, "bias", bias)
        if tuple(bias.shape) != (outputs,):
            raise ValueError(f"{NAME}: bias has the shape {tuple(bias.shape)}; [{outputs}] is needed")


def _multiply(x: Tensor, factor: Factor, own: Own, bias: Tensor | None, addend: Tensor | None = None) -> Tensor:
    """By the operation of the factor alone."""
    if factor.dtype is not None:
        return dense.linear_dense(x, own[0], bias, addend=addend)
    linear = int8.linear_coded_int8 if factor.int8 else coded.linear_coded
    return linear(x, *own, bias, factor.format, factor.columns, factor.outputs, addend=addend)


def apart(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str, addend: Tensor | None = None) -> Tensor:
    """The same by one operation for each factor, which differentiate with respect to dense factors too. Every sum is
    rounded to x's dtype. `addend` [..., N], in x's dtype or fp32, is the first of them.
    """
    total = addend
    terms = split(tensors, parse(plan))
    for term in reversed(terms):
        y = x
        for factor, own in reversed(term[1:]):
            y = _multiply(y, factor, own, None)
        total = _multiply(y, *term[0], bias if term is terms[0] else None, total)
    assert total is not None
    return total


def _reference(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor:
    return summed(x, tensors, bias, plan).to(x.dtype)


def summed(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor:
    """Each product in fp32 arithmetic with the decoded matrix, rounded to x's dtype between factors; [..., N] fp32."""
    terms = split(tensors, parse(plan))
    total = x.new_zeros((*x.shape[:-1], terms[0][0][0].outputs), dtype=torch.float32)
    if x.numel() == 0:
        return total
    for term in reversed(terms):
        y = x.float()
        for factor, own in reversed(term):
            y = int8.rounded_to_int8(y.to(x.dtype)) if factor.int8 else y.to(x.dtype).float()
            y = torch.nn.functional.linear(y, _matrix(factor, own))
        total = total + y
    return total if bias is None else total + bias.float()


def _matrix(factor: Factor, own: Own) -> Tensor:
    if factor.dtype is not None:
        return own[0].float()
    return reference.dense(*own, factor.format, factor.columns, factor.outputs)


def compiled_chain(call: ChainCall, tensors: Sequence[Tensor], bias: Tensor | None) -> tuple[_C.Chain, list[int]]:
    """The call but for its tensors' addresses, and where each of these goes in the list that C++ takes, which has room
    for STORED of every factor.
    """
    chain, places = _C.Chain(TYPES[call.dtype]), list[int]()
    kernels = enumerate(call.factors())
    for number, term in enumerate(split(tensors, parse(call.plan))):
        for factor, own in term:
            index, (_, kernel) = next(kernels)
            places += [len(STORED) * index + i for i, tensor in enumerate(own) if tensor is not None]
            added, shape = bias if index == 0 else None, (factor.outputs, factor.columns)
            if factor.dtype is not None:
                bias_type = 0 if added is None else TYPES[added.dtype]
                chain.dense(number, kernel.name, *shape, TYPES[factor.dtype], bias_type)
            else:
                kind = (storage(factor.format), 1, *shape, call.dtype, own[1], added, is_packed(own[0]))
                chain.coded(number, kernel.name, settle(*kind, factor.int8))
    return chain, places


def addresses(places: list[int], tensors: Sequence[Tensor]) -> list[int]:
    """The list that C++ takes."""
    found = [0] * (places[-1] + len(STORED))
    for place, tensor in zip(places, tensors, strict=True):
        found[place] = tensor.data_ptr()
    return found


def digits(call: ChainCall) -> dict[int, Factor]:
    """The factors whose codes are written as bits before kernels read them, by where these are among the tensors."""
    found, at, packed = dict[int, Factor](), 0, iter(call.packed)
    for factor in itertools.chain(*parse(call.plan)):
        if not next(packed) and Format.parse(factor.format).per_byte:
            found[at] = factor
        at += len(_names(factor.format))
    return found


def _settle(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Launch:
    """The launch for tensors of these shapes and dtypes. It keeps none of them."""
    call = describe(x, tensors, bias, plan)
    chain, places = compiled_chain(call, tensors, bias)
    shape, rows = (*x.shape[:-1], parse(plan)[0][0].outputs), call.rows
    rewritten = digits(call)

    def launch(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        # Names are held until the kernels return: the addresses are of these tensors.
        x, held = x.contiguous(), [tensor.contiguous() for tensor in tensors]
        for at, factor in rewritten.items():
            held[at] = to_bits(held[at], Format.parse(factor.format), factor.columns)
        bias = None if bias is None else bias.contiguous()
        y = x.new_empty(shape)
        others = (0 if bias is None else bias.data_ptr(), x.data_ptr(), y.data_ptr())
        _C.run_chain(chain, addresses(places, held), *others, rows, torch.get_num_threads())
        return y

    return launch


def _compiled(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor:
    return _settle(x, tensors, bias, plan)(x, tensors, bias)


def _refuses(call: ChainCall) -> str | None:
    if call.rows == 0:
        return "there are no rows"
    for factor, kernel in call.factors():
        if kernel.isa == table.TORCH:
            return f"{kernel.name} multiplies by {factor}"
        if factor.dtype is None and storage(factor.format).by_column:
            return f"the scales of {factor} are factors of x"
    return None


def _parts(*arguments: Any) -> list[tuple[str, Any]]:
    """The products of a call, in the order in which they run."""
    call = describe(*arguments)._replace(device="cpu")
    packed = list(call.packed)
    terms = [[(factor, packed.pop(0)) for factor in term] for term in parse(call.plan)]
    return [
        (factor.operation.NAME, factor.call("cpu", call.dtype, call.rows, panels))
        for term in reversed(terms)
        for factor, panels in reversed(term)
    ]


table.register(
    table.Operation(
        NAME,
        describe,
        (
            table.Kernel("chain-linear-compiled", "generic", _compiled, _refuses),
            table.Kernel("chain-linear-apart", table.TORCH, apart),
            table.Kernel("chain-linear-torch", table.TORCH, _reference),
        ),
        _parts,
    )
)
LIBRARY.define(f"{NAME}(Tensor x, Tensor[] tensors, Tensor? bias, str plan) -> Tensor")

Launch = Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]


def _cpu(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor:
    key = (
        NAME,
        machine.isa(),
        plan,
        x.dtype,
        x.shape,
        None if bias is None else (bias.dtype, bias.shape),
        *[(tensor.dtype, tensor.shape) for tensor in tensors],
    )
    launch: Launch | None = launches.get(key)
    if launch is None:
        check(x, tensors, bias, plan)
        run = table.choose(NAME, describe(x, tensors, bias, plan)).run
        launch = _settle(x, tensors, bias, plan) if run is _compiled else lambda *others: run(*others, plan)
        remember(key, launch)
    return launch(x, tensors, bias)


def _fake(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(plan)[0][0].outputs))


def _needs_grad(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


def _composed(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor | None:
    """By operations apart where factors train."""
    return apart(x, tensors, bias, plan) if any(tensor.requires_grad for tensor in tensors) else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, bias, ctx.plan = inputs
    ctx.save_for_backward(*tensors)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ W, factor by factor in fp32; grad_bias = the sum of grad over rows."""
    grad_x = grad_bias = None
    wide = grad.float()
    if ctx.needs_input_grad[0]:
        grad_x = times(wide, ctx.saved_tensors, ctx.plan).to(ctx.x_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = wide.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None


def times(grad: Tensor, tensors: Sequence[Tensor], plan: str) -> Tensor:
    """grad [..., N] @ W in fp32, of grad in fp32."""
    return functools.reduce(torch.add, (_times(grad, term) for term in split(tensors, parse(plan))))


def _times(grad: Tensor, term: Sequence[tuple[Factor, Own]]) -> Tensor:
    """grad @ the term."""
    for factor, own in term:
        if factor.dtype is not None:
            grad = grad @ _matrix(factor, own)
        else:
            grad = times_matrix(grad, own, factor.format, factor.columns, factor.outputs)
    return grad


table.implement(NAME, check, _fake, _cpu)
differentiate(NAME, _needs_grad, _setup, _backward, _composed)


def linear_chain(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, plan: str) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias in x's dtype (fp32, bf16 or fp16), W made of `tensors` as `plan` says.

    `tensors` are those of the plan's factors, one factor after the other: of each its `Format.tensors` in their order,
    as they are or as `pack` made them. Differentiable with respect to x, bias and dense factors. Raises ValueError or
    TypeError naming the argument.
    """
    if undispatched(x, bias, *tensors):
        return _cpu(x, tensors, bias, plan)
    return torch.ops.parco.linear_chain.default(x, list(tensors), bias, plan)
