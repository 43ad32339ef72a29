"""linear_dense: y = x @ weight.T + bias for weights stored in fp32, bf16 or fp16, whatever the dtypes of x and y.

With few rows the weights' bytes are the cost: the compiled kernel reads each once, widens it in registers and sums in
fp32. With more, weights of 16 bits are widened a block at a time in the cache, which spares the memory a widened copy.
With very many it is torch's product: in x's dtype where that is fast, or in fp32 on operands widened before. AMX tiles
multiply bf16 by bf16 as they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.activations import NONE, NUMBERS
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched
from parco.kernels.linear import epilogue, reference

NAME = "linear_dense"

STREAMED_ROWS = 4
"""Rows of x up to which reading the weights is the cost and torch's product of one dtype is slower: 1.4 times at 1
row, measured.
"""

MIXED_ROWS = 8
"""The same where dtypes differ, so that torch would have to widen the weights first."""

AMX_ROWS = 16
"""Rows of x from which AMX tiles pay: a tile has 16."""

TILED_ROWS = 48
"""Rows of x from which widening bf16 weights in the cache is faster than torch's bf16 product where the processor has
no AMX: measured, 1.35 times at 128 rows and as fast at 32.
"""

WIDENED_ROWS = 1024
"""Rows of x that repay a widened copy of the weights, and torch's float32 product: measured, 1.08 times at 2,048 rows
and 0.88 times at 512.
"""


class DenseCall(NamedTuple):
    """One call of linear_dense: `rows` x of `dtype` against `outputs` by `columns` weights of `weight_dtype`; y has
    `y_dtype`, that of x where it is None.
    """

    device: str
    isa: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    y_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        end = "" if self.y_dtype in (None, self.dtype) else f" to {self.y_dtype}"
        return f"{self.rows} rows of {self.dtype} x {self.weight_dtype} {self.outputs}x{self.columns}{end}"


def describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = NONE,
    addend: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> DenseCall:
    """The table's key of a call."""
    outputs, columns = weight.shape
    rows = x.numel() // columns if columns else 0
    return DenseCall(x.device.type, machine.isa(), x.dtype, weight.dtype, rows, outputs, columns, dtype)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = NONE,
    addend: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("linear_dense", "x", x)
    check_float("linear_dense", "weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"linear_dense: weight has the shape {tuple(weight.shape)}; a matrix is needed")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_dense: x has the shape {tuple(x.shape)}; its last dimension must be {weight.shape[1]}, "
            "as the weight's"
        )
    if bias is not None:
        check_float("linear_dense", "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_dense: bias has the shape {tuple(bias.shape)}; [{weight.shape[0]}] is needed")
    epilogue.check("linear_dense", x, weight.shape[0], activation, addend)
    if dtype is not None and dtype not in TYPES:
        raise TypeError(f"linear_dense: dtype is {dtype}; float32, bfloat16 or float16 is needed")


def compiled(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """A compiled kernel as a function of the operation's arguments."""

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str = NONE,
        addend: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        outputs, columns = weight.shape
        y = x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
        bias = None if bias is None else bias.contiguous()
        addend = None if addend is None else addend.contiguous()
        kernel(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if addend is None else addend.data_ptr(),
            y.data_ptr(),
            x.numel() // columns,
            outputs,
            columns,
            TYPES[x.dtype],
            TYPES[weight.dtype],
            0 if bias is None else TYPES[bias.dtype],
            TYPES[y.dtype],
            NUMBERS[activation],
            epilogue.type_of(addend),
            torch.get_num_threads(),
        )
        return y

    return run


def _refuses_streams(call: DenseCall) -> str | None:
    limit = STREAMED_ROWS if call.dtype == call.weight_dtype else MIXED_ROWS
    if call.rows > limit:
        return f"{call.rows} rows repay a blocked product; it serves up to {limit}"
    if call.rows == 0 or call.outputs == 0 or call.columns == 0:
        return "one of the sizes is 0"
    return None


def _refuses(call: DenseCall) -> str | None:
    few = _refuses_streams(call)
    if few is None or min(call.rows, call.outputs, call.columns) == 0:
        return few
    if call.weight_dtype == torch.float32:
        return f"{call.rows} rows of float32 weights are torch's; it serves few"
    if call.rows >= WIDENED_ROWS:
        return f"from {WIDENED_ROWS} rows a widened copy of the weights pays"
    if call.dtype == call.weight_dtype == torch.bfloat16:
        if machine.contains(call.isa, "amx"):
            return "torch multiplies bfloat16 in AMX tiles"
        if call.rows < TILED_ROWS:
            return f"{call.rows} rows do not repay widening in the cache; they do from {TILED_ROWS}"
    return None


def _refuses_tiles(call: DenseCall) -> str | None:
    if not call.dtype == call.weight_dtype == torch.bfloat16:
        return f"its tiles multiply bfloat16; these are {call.dtype} and {call.weight_dtype}"
    if call.rows < AMX_ROWS:
        return f"{call.rows} rows do not fill a tile; it starts at {AMX_ROWS}"
    return "one of the sizes is 0" if min(call.outputs, call.columns) == 0 else None


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = NONE, addend: Tensor | None = None, *_: Any
) -> Tensor:
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activation == NONE and addend is None:
        return y
    return epilogue.finish(y.float(), activation, addend).to(x.dtype)


def _refuses_native(call: DenseCall) -> str | None:
    if call.dtype != call.weight_dtype:
        return f"torch multiplies operands of one dtype; these are {call.dtype} and {call.weight_dtype}"
    if call.y_dtype not in (None, call.dtype):
        return f"torch rounds to {call.dtype}; {call.y_dtype} is asked for"
    if call.device != "cpu" or call.dtype == torch.float32 or machine.contains(call.isa, "amx"):
        return None
    if call.dtype == torch.float16:
        return "torch's float16 product on a CPU sums in float16 on some builds"
    if call.rows >= TILED_ROWS:
        return f"without AMX torch's float32 product is faster than its bfloat16 one from {TILED_ROWS} rows up"
    return None


def _element_of_torch(call: DenseCall) -> str:
    return "bf16" if call.dtype == torch.bfloat16 else "fp32"


table.register(
    table.Operation(
        "linear_dense",
        describe,
        (
            table.Kernel("dense-linear-amx", "amx", compiled(_C.linear_dense_amx), _refuses_tiles, lambda call: "bf16"),
            table.Kernel("dense-linear-avx512", "avx512", compiled(_C.linear_dense_avx512), _refuses),
            table.Kernel("dense-linear-avx2", "avx2", compiled(_C.linear_dense_avx2), _refuses),
            table.Kernel("dense-linear-generic", "generic", compiled(_C.linear_dense_generic), _refuses_streams),
            table.Kernel("dense-linear-torch-native", table.TORCH, _native, _refuses_native, _element_of_torch),
            table.Kernel("dense-linear-torch-widened", table.TORCH, reference.linear_dense),
        ),
    )
)

LIBRARY.define(
    f"linear_dense(Tensor x, Tensor weight, Tensor? bias, {epilogue.SCHEMA}, ScalarType? dtype=None) -> Tensor"
)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = NONE,
    addend: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _needs_grad(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = NONE, addend: Tensor | None = None, *_: Any
) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, addend))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[:3]
    ctx.activation, addend = epilogue.given(inputs, 3)
    ctx.given = len(inputs)
    ctx.save_for_backward(x, weight, bias)
    ctx.addend_dtype = None if addend is None else addend.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ weight, grad_weight = gradᵀ @ x, grad_bias = the sum of grad over rows, grad_addend = grad; all
    summed in fp32. Before an activation grad is multiplied by its slope, for which the product is computed again.
    """
    x, weight, bias = ctx.saved_tensors
    wide = grad.float()
    grad_addend = grad.to(ctx.addend_dtype) if ctx.addend_dtype is not None and ctx.needs_input_grad[4] else None
    if ctx.activation != NONE:
        before = torch.ops.parco.linear_dense.default(x.float(), weight, bias)
        wide = epilogue.through(wide, before, ctx.activation)
    rows = wide.reshape(-1, wide.shape[-1])
    grad_x = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_weight = (rows.T @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(bias.dtype)
    return (grad_x, grad_weight, grad_bias, None, grad_addend, None)[: ctx.given]


_cpu = table.implement("linear_dense", check, _fake)
differentiate("linear_dense", _needs_grad, _setup, _backward)


def linear_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = NONE,
    addend: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y [..., N] = activation(x [..., K] @ weight [N, K].T + bias) + addend, summed in fp32 and rounded once to
    `dtype`, by default that of x (but where torch's own product serves, which rounds before).

    x, weight, bias and y are each fp32, bf16 or fp16; `activation` is none, silu, gelu, gelu_tanh, relu or
    relu_squared, and `addend` [..., N] has x's dtype or fp32. Differentiable with respect to all tensors. Raises
    ValueError or TypeError naming the argument.
    """
    if undispatched(x, weight, bias, addend):
        return _cpu(x, weight, bias, activation, addend, dtype)
    return torch.ops.parco.linear_dense.default(x, weight, bias, activation, addend, dtype)
