"""linear_int: y = x @ ((u − z)·scale).T + bias over stored integer codes of 2 to 8 bits.

The compiled kernels turn x into 16-bit words under a power-of-two scale per row and block of at most 128 columns, sum
the products of words and codes exactly in int32, and add the blocks in fp32 in ascending order. So every instruction
set, batch size and thread count gives the same bits. x loses at most 2⁻¹⁵ of its block's largest magnitude (bf16,
fp16: nearly all values are kept exactly) or 2⁻²⁹ (fp32, which takes two words). The words split into signed bytes for
AMX, to the same sums.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, check_float, check_matrix, differentiate
from parco.kernels.linear import reference

AMX_ROWS = 16
"""Rows of x from which tiles pay: a tile has 16."""


class IntCall(NamedTuple):
    """One call of linear_int: `rows` x of `dtype` against `outputs` by `columns` codes."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        zero = "" if self.symmetric else ", asymmetric"
        return (
            f"{self.rows} rows of {self.dtype} x int{self.bits} codes {self.outputs}x{self.columns}, "
            f"groups of {self.group}{zero}, {torch.get_num_threads()} threads"
        )


def describe(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> IntCall:
    """The table's key of a call."""
    rows = x.numel() // columns if columns else 0
    return IntCall(x.device.type, machine.isa(), x.dtype, rows, codes.shape[0], columns, bits, group, zero is None)


def check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("linear_int", "x", x)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"linear_int: x has the shape {tuple(x.shape)}; its last dimension must be columns={columns}")
    check_codes("linear_int", codes, scale, zero, bits, group, columns)
    if bias is not None:
        check_float("linear_int", "bias", bias)
        if bias.shape != codes.shape[:1]:
            raise ValueError(f"linear_int: bias has the shape {tuple(bias.shape)}; [{codes.shape[0]}] is needed")


def check_codes(
    operation: str, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, columns: int
) -> None:
    """The part of the checks that concerns the stored tensors: codes [N, bytes], scale [N, groups] or [1, 1], zero
    [N, groups].
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"{operation}: bits={bits}; codes have 2 to 8 bits")
    if columns < 1:
        raise ValueError(f"{operation}: columns={columns}; at least one is needed")
    if group < 1 or (group < columns and group % 16):
        raise ValueError(f"{operation}: group={group}; a multiple of 16, or all {columns} columns, is needed")
    check_matrix(operation, "codes", codes, (codes.shape[0], (columns * bits + 7) // 8), torch.uint8)
    check_float(operation, "scale", scale)
    groups = (codes.shape[0], (columns + group - 1) // group)
    if tuple(scale.shape) != groups and tuple(scale.shape) != (1, 1):
        raise ValueError(f"{operation}: scale has the shape {tuple(scale.shape)}; {groups} or (1, 1) is needed")
    if groups[1] > 1 and tuple(scale.shape) == (1, 1):
        raise ValueError(f"{operation}: one scale for all needs group={columns}, all columns; it is {group}")
    if zero is not None:
        check_matrix(operation, "zero", zero, groups, torch.uint8)


Launch = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""An operation with everything but its tensors settled: x, codes, scale, zero, bias -> y."""


@final
class Compiled:
    """A compiled kernel as a function of the operation's arguments; `settle` works out once what calls of a kind
    share.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(
        self,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group: int,
        columns: int,
    ) -> Tensor:
        return self.settle(x, codes, scale, bias, bits, group, columns)(x, codes, scale, zero, bias)

    def settle(
        self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group: int, columns: int
    ) -> Launch:
        """The launch for tensors of these shapes and dtypes. It keeps none of them."""
        function, dtype, outputs = self.function, x.dtype, codes.shape[0]
        shape = (*x.shape[:-1], outputs)
        scale_stride = scale.shape[1] if scale.shape[0] == outputs else 0
        bias_type = 0 if bias is None else TYPES[bias.dtype]
        sizes = (x.numel() // columns, outputs, columns, group, scale_stride, bits)
        numbers = (*sizes, TYPES[dtype], TYPES[scale.dtype], bias_type)

        def launch(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
            # Names are held until the kernel returns: the addresses are of these tensors.
            x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
            zero = None if zero is None else zero.contiguous()
            bias = None if bias is None else bias.contiguous()
            y = torch.empty(shape, dtype=dtype)
            function(
                x.data_ptr(),
                codes.data_ptr(),
                scale.data_ptr(),
                0 if zero is None else zero.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                y.data_ptr(),
                *numbers,
                torch.get_num_threads(),
            )
            return y

        return launch


def _refuses(call: IntCall) -> str | None:
    return "there are no rows or no outputs" if call.rows == 0 or call.outputs == 0 else None


def _refuses_tiles(call: IntCall) -> str | None:
    if call.rows < AMX_ROWS:
        return f"{call.rows} rows do not fill a tile; it starts at {AMX_ROWS}"
    return _refuses(call)


table.register(
    table.Operation(
        "linear_int",
        describe,
        (
            table.Kernel("int-linear-amx", "amx", Compiled(_C.linear_int_amx), _refuses_tiles),
            table.Kernel("int-linear-avx512", "avx512", Compiled(_C.linear_int_avx512), _refuses),
            table.Kernel("int-linear-avx2", "avx2", Compiled(_C.linear_int_avx2), _refuses),
            table.Kernel("int-linear-generic", "generic", Compiled(_C.linear_int_generic), _refuses),
            table.Kernel("int-linear-torch", table.TORCH, reference.linear_int),
        ),
    )
)

_launches: dict[Hashable, Launch] = {}
KEPT_LAUNCHES = 8192
"""Kinds of call whose checks and choice are remembered: together they cost as much as a small product."""

LIBRARY.define(
    "linear_int(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group, int columns)"
    " -> Tensor"
)


def _reference(*arguments: Any) -> Tensor:
    check(*arguments)
    return reference.linear_int(*arguments)


def _cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    key = (
        machine.isa(),
        x.dtype,
        x.shape,
        codes.dtype,
        codes.shape,
        scale.dtype,
        scale.shape,
        None if zero is None else (zero.dtype, zero.shape),
        None if bias is None else (bias.dtype, bias.shape),
        bits,
        group,
        columns,
    )
    launch = _launches.get(key)
    if launch is None:
        launch = _settle(x, codes, scale, zero, bias, bits, group, columns)
        if len(_launches) >= KEPT_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    return launch(x, codes, scale, zero, bias)


def _settle(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Launch:
    """Check the arguments and choose their kernel."""
    check(x, codes, scale, zero, bias, bits, group, columns)
    call = describe(x, codes, scale, zero, bias, bits, group, columns)
    run = table.choose("linear_int", call).run
    if isinstance(run, Compiled):
        return run.settle(x, codes, scale, bias, bits, group, columns)
    return lambda x, codes, scale, zero, bias: run(x, codes, scale, zero, bias, bits, group, columns)


def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    check(x, codes, scale, zero, bias, bits, group, columns)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _needs_grad(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *_: int) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero, bias, ctx.bits, ctx.group, ctx.columns = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


EXPANDED = 1 << 24
"""Numbers of W that the backward pass holds in fp32 at a time."""


def _grad_x(
    grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    """grad [..., N] @ W, some rows of W expanded at a time."""
    total = grad.new_zeros((*grad.shape[:-1], columns))
    step = max(1, EXPANDED // columns)
    for first in range(0, codes.shape[0], step):
        rows = torch.arange(first, min(first + step, codes.shape[0]), device=codes.device)
        weight = torch.ops.parco.embedding_int(rows, codes, scale, zero, bits, group, columns, torch.float32)
        total += grad[..., first : first + step] @ weight
    return total


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ W with W expanded in fp32 from the same codes; grad_bias = the sum of grad over rows."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes, scale, zero = ctx.saved_tensors
        grad_x = _grad_x(grad.float(), codes, scale, zero, ctx.bits, ctx.group, ctx.columns).to(ctx.x_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


LIBRARY.impl("linear_int", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear_int", _cpu, "CPU")
torch.library.register_fake("parco::linear_int", _fake, lib=LIBRARY)
differentiate("linear_int", _needs_grad, _setup, _backward)


def linear_int(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """y [..., N] = x [..., K] @ ((u − z)·scale).T + bias, in x's dtype (fp32, bf16 or fp16), rounded once.

    `codes` uint8 [N, ceil(K·bits/8)] is an LSB-first bit stream of unsigned u; `scale` [N, ceil(K/group)] (bf16,
    fp16, fp32), or [1, 1] for the whole matrix; `zero` uint8 like scale, or None for z = 2^(bits−1). `columns` is K.
    A row of x with inf or NaN becomes NaN as a whole. Differentiable with respect to x and bias. Raises ValueError or
    TypeError naming the argument.
    """
    return torch.ops.parco.linear_int.default(x, codes, scale, zero, bias, bits, group, columns)
