"""linear_coded: y = x @ W.T + bias for a matrix W stored as codes and scales, in any format that is not dense.

Where the numbers of the codes are small integers times a power of two (int2 to int8, ternary, fp4, fp6_e2m3), compiled
kernels compute in integers: x becomes 16-bit words under a power-of-two scale per row and block of at most 128 columns,
the products of words and codes are summed exactly in int32, and the blocks are added in fp32 in ascending order. So
every instruction set, batch size and thread count gives the same bits. x loses at most 2⁻¹⁵ of its block's largest
magnitude (bf16, fp16: nearly all values are kept exactly) or 2⁻²⁹ (fp32, which takes two words).

The other elements (fp8, fp6_e3m2, NF4) are widened to fp32 in registers or in the cache, and summed in fp32. On AMX
tiles they become bf16 instead, and so do fp4 and fp6_e2m3 under scales that are small floats themselves.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.activations import NONE
from parco.kernels.cast import to_bits
from parco.kernels.library import LIBRARY, check_float, undispatched
from parco.kernels.linear import epilogue, reference
from parco.kernels.linear.gradient import differentiate_coded
from parco.kernels.linear.panels import is_packed
from parco.kernels.linear.storage import Storage, check_tensors, rows_of, settle, storage

NAME = "linear_coded"

AMX_ROWS = 16
"""Rows of x from which tiles pay: a tile has 16."""


class CodedCall(NamedTuple):
    """One call of linear_coded: `rows` x of `dtype` against `outputs` by `columns` codes of `format`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    format: str
    packed: bool = False
    int8: bool = False

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.dtype}{' as int8' if self.int8 else ''} x {self.format} "
            f"{self.outputs}x{self.columns}{' in panels' if self.packed else ''}, {torch.get_num_threads()} threads"
            f"{', digits written as bits first' if storage(self.format).rewrites(self.packed) else ''}"
        )


def describe(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
    activation: str = NONE,
    addend: Tensor | None = None,
) -> CodedCall:
    """The table's key of a call."""
    rows = x.numel() // columns if columns else 0
    shape = (rows_of(codes, outputs), columns)
    return CodedCall(x.device.type, machine.isa(), x.dtype, rows, *shape, format, is_packed(codes))


def check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
    activation: str = NONE,
    addend: Tensor | None = None,
    operation: str = NAME,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float(operation, "x", x)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"{operation}: x has the shape {tuple(x.shape)}; its last dimension must be columns={columns}")
    tensors = {"codes": codes, "scale": scale, "zero": zero, "global_scale": global_scale}
    check_tensors(operation, format, columns, outputs, tensors)
    if bias is not None:
        check_float(operation, "bias", bias)
        if tuple(bias.shape) != (rows_of(codes, outputs),):
            raise ValueError(
                f"{operation}: bias has the shape {tuple(bias.shape)}; [{rows_of(codes, outputs)}] is needed"
            )
    epilogue.check(operation, x, rows_of(codes, outputs), activation, addend)


Launch = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""The operation with everything but its tensors settled: x, codes, scale, zero, global_scale, bias, addend -> y."""


@final
class Compiled:
    """A compiled kernel as a function of the operation's arguments; `settle` works out once what calls of a kind
    share.
    """

    def __init__(self, function: Callable[..., None], int8: bool = False) -> None:
        self.function, self.int8 = function, int8

    def __call__(
        self,
        x: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        global_scale: Tensor | None,
        bias: Tensor | None,
        format: str,
        columns: int,
        outputs: int = 0,
        activation: str = NONE,
        addend: Tensor | None = None,
    ) -> Tensor:
        launch = self.settle(x, codes, scale, bias, format, outputs, activation, addend)
        return launch(x, codes, scale, zero, global_scale, bias, addend)

    def settle(
        self,
        x: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        format: str,
        outputs: int,
        activation: str = NONE,
        addend: Tensor | None = None,
    ) -> Launch:
        """The launch for tensors of these shapes and dtypes. It keeps none of them."""
        stored = storage(format)
        if not stored.by_column:
            return self._launch(stored, x, codes, scale, bias, outputs, activation, addend)
        product = self._launch(stored, x.float(), codes, None, bias, outputs, activation, addend)

        def launch(
            x: Tensor,
            codes: Tensor,
            scale: Tensor | None,
            zero: Tensor | None,
            global_scale: Tensor | None,
            bias: Tensor | None,
            addend: Tensor | None,
        ) -> Tensor:
            assert scale is not None
            return product(x.float() * scale[0].float(), codes, None, None, None, bias, addend).to(x.dtype)

        return launch

    def _launch(
        self,
        stored: Storage,
        x: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        outputs: int,
        activation: str,
        addend: Tensor | None,
    ) -> Launch:
        """The call itself: without `scale`, of codes that stand for their numbers."""
        function, outputs, columns = self.function, rows_of(codes, outputs), x.shape[-1]
        shape = (*x.shape[:-1], outputs)
        rows, packed = x.numel() // columns, is_packed(codes)
        rewrites = stored.rewrites(packed)
        settled = settle(
            stored,
            rows,
            outputs,
            columns,
            x.dtype,
            scale,
            bias,
            packed,
            self.int8,
            activation,
            epilogue.type_of(addend),
        )

        def launch(
            x: Tensor,
            codes: Tensor,
            scale: Tensor | None,
            zero: Tensor | None,
            global_scale: Tensor | None,
            bias: Tensor | None,
            addend: Tensor | None,
        ) -> Tensor:
            # Names are held until the kernel returns: the addresses are of these tensors.
            x, codes = x.contiguous(), codes.contiguous()
            if rewrites:
                codes = to_bits(codes, stored.format, columns)
            scale = None if scale is None else scale.contiguous()
            zero = None if zero is None else zero.contiguous()
            bias = None if bias is None else bias.contiguous()
            addend = None if addend is None else addend.contiguous()
            y = x.new_empty(shape)
            function(
                settled,
                x.data_ptr(),
                codes.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                0 if zero is None else zero.data_ptr(),
                0 if global_scale is None else global_scale.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if addend is None else addend.data_ptr(),
                y.data_ptr(),
                torch.get_num_threads(),
            )
            return y

        return launch


def _refuses(call: CodedCall) -> str | None:
    if call.rows == 0 or call.outputs == 0:
        return "there are no rows or no outputs"
    return storage(call.format).refusal


def refuses_integers(call: CodedCall) -> str | None:
    """Why kernels that compute in integers do not run a call, or None."""
    if not storage(call.format).integers:
        return f"the numbers of {call.format} are no small integers times a power of two"
    return _refuses(call)


def refuses_tiles(call: CodedCall) -> str | None:
    """As `refuses_integers`, of those on tiles."""
    if call.rows < AMX_ROWS:
        return f"{call.rows} rows do not fill a tile; it starts at {AMX_ROWS}"
    return refuses_integers(call)


def _refuses_bf16_tiles(call: CodedCall) -> str | None:
    stored = storage(call.format)
    if call.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16; x is {call.dtype}"
    if call.rows < AMX_ROWS:
        return f"{call.rows} rows do not fill a tile; it starts at {AMX_ROWS}"
    if stored.integers and not stored.is_bf16:
        return f"{call.format} is computed in integers"
    if not stored.integers and not stored.widens:
        return f"it does not widen the codes of {call.format}"
    return "the scale of a column multiplies x in fp32" if stored.by_column else _refuses(call)


def _refuses_vectors(call: CodedCall) -> str | None:
    stored = storage(call.format)
    group = stored.format.block.columns
    if not stored.widens:
        return f"it does not widen the codes of {call.format}"
    if not call.packed and group is not None and group < call.columns and group & (group - 1):
        return f"groups of {group} columns are no power of two"
    return _refuses(call)


def words(call: CodedCall) -> str:
    """The element of kernels that multiply 16-bit words of x."""
    return "int16"


table.register(
    table.Operation(
        "linear_coded",
        describe,
        (
            table.Kernel("float-linear-amx", "amx", Compiled(_C.float_amx), _refuses_bf16_tiles, lambda call: "bf16"),
            table.Kernel("int-linear-amx", "amx", Compiled(_C.int_amx), refuses_tiles, lambda call: "int8"),
            table.Kernel(
                "int-linear-avx512_vbmi", "avx512_vbmi", Compiled(_C.int_avx512_vbmi), refuses_integers, words
            ),
            table.Kernel("float-linear-avx512_vbmi", "avx512_vbmi", Compiled(_C.float_avx512_vbmi), _refuses_vectors),
            table.Kernel("int-linear-avx512", "avx512", Compiled(_C.int_avx512), refuses_integers, words),
            table.Kernel("float-linear-avx512", "avx512", Compiled(_C.float_avx512), _refuses_vectors),
            table.Kernel("int-linear-avx2", "avx2", Compiled(_C.int_avx2), refuses_integers, words),
            table.Kernel("float-linear-avx2", "avx2", Compiled(_C.float_avx2), _refuses_vectors),
            table.Kernel("int-linear-generic", "generic", Compiled(_C.int_generic), refuses_integers, words),
            table.Kernel("float-linear-generic", "generic", Compiled(_C.float_generic), _refuses),
            table.Kernel("coded-linear-torch", table.TORCH, reference.linear_coded),
        ),
    )
)

launches: dict[Hashable, Any] = {}
KEPT_LAUNCHES = 8192
"""Kinds of call whose checks and choice are remembered: together they cost as much as a small product."""

SIGNATURE = (
    "(Tensor x, Tensor codes, Tensor? scale, Tensor? zero, Tensor? global_scale, Tensor? bias, str format,"
    f" int columns, int outputs, {epilogue.SCHEMA}) -> Tensor"
)
LIBRARY.define(f"linear_coded{SIGNATURE}")


def remember(kind: Hashable, launch: Any) -> None:
    """Keep the launch of a kind of call."""
    if len(launches) >= KEPT_LAUNCHES:
        launches.clear()
    launches[kind] = launch


def _kind(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def remembering(
    operation: str, describe: Callable[..., CodedCall], check: Callable[..., None]
) -> Callable[..., Tensor]:
    """What runs `operation` on the CPU: checks the arguments and chooses their kernel once for each kind of call."""

    def settle(x: Tensor, codes: Tensor, scale: Tensor | None, *others: Any) -> Launch:
        check(x, codes, scale, *others)
        run = table.choose(operation, describe(x, codes, scale, *others)).run
        *_, bias, format, columns, outputs, activation, addend = others
        if isinstance(run, Compiled):
            return run.settle(x, codes, scale, bias, format, outputs, activation, addend)
        return lambda *tensors: run(*tensors[:-1], format, columns, outputs, activation, tensors[-1])

    def cpu(
        x: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        global_scale: Tensor | None,
        bias: Tensor | None,
        format: str,
        columns: int,
        outputs: int = 0,
        activation: str = NONE,
        addend: Tensor | None = None,
    ) -> Tensor:
        key = (
            operation,
            machine.isa(),
            x.dtype,
            x.shape,
            codes.dtype,
            codes.shape,
            None if scale is None else (scale.dtype, scale.shape),
            _kind(zero),
            _kind(global_scale),
            None if bias is None else (bias.dtype, bias.shape),
            format,
            columns,
            outputs,
            activation,
            None if addend is None else (addend.dtype, addend.shape),
        )
        launch = launches.get(key)
        if launch is None:
            launch = settle(x, codes, scale, zero, global_scale, bias, format, columns, outputs, activation, addend)
            remember(key, launch)
        return launch(x, codes, scale, zero, global_scale, bias, addend)

    return cpu


_cpu = remembering(NAME, describe, check)


def fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
    activation: str = NONE,
    addend: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows_of(codes, outputs)))


table.implement(NAME, check, fake, _cpu)
differentiate_coded(NAME)


def linear_coded(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
    activation: str = NONE,
    addend: Tensor | None = None,
) -> Tensor:
    """y [..., N] = activation(x [..., K] @ W.T + bias) + addend, in x's dtype (fp32, bf16 or fp16), rounded once.

    W [N, K] is stored in `format`, whose name this is; codes, scale, zero and global_scale are its tensors
    (`Format.tensors`), None for those that it has not, or the panels that `pack` made of them; `columns` is K, and
    `outputs`, which panels need, N. Where codes are computed in integers a row of x
    with inf or NaN becomes NaN as a whole. `activation` is none, silu, gelu, gelu_tanh, relu or relu_squared, and
    `addend` [..., N] has x's dtype or fp32. Differentiable with respect to x, bias and addend. Raises ValueError or
    TypeError naming the argument.
    """
    arguments = (x, codes, scale, zero, global_scale, bias, format, columns, outputs, activation, addend)
    if undispatched(x, codes, scale, zero, global_scale, bias, addend):
        return _cpu(*arguments)
    return torch.ops.parco.linear_coded.default(*arguments)
