"""Calls of products with everything but their tensors settled, remembered by kind: checks and the choice of a kernel
together cost as much as a small product.
"""

from collections.abc import Callable, Hashable
from typing import Any, final

import torch
from torch import Tensor

from parco import machine
from parco.kernels import table
from parco.kernels.activations import NONE
from parco.kernels.cast import to_bits
from parco.kernels.linear import epilogue
from parco.kernels.linear.panels import is_packed
from parco.kernels.linear.storage import Storage, rows_of, settle, storage

Launch = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""An operation with everything but its tensors settled: x, codes, scale, zero, global_scale, bias, addend -> y."""


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


launches: dict[Hashable, Any] = {}
KEPT_LAUNCHES = 8192
"""Kinds of call that are remembered."""


def remember(kind: Hashable, launch: Any) -> None:
    """Keep the launch of a kind of call."""
    if len(launches) >= KEPT_LAUNCHES:
        launches.clear()
    launches[kind] = launch


def _kind(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def remembering(
    operation: str, describe: Callable[..., table.Call], check: Callable[..., None]
) -> Callable[..., Tensor]:
    """What runs `operation` on the CPU: checks the arguments and chooses their kernel once for each kind of call."""

    def settled(x: Tensor, codes: Tensor, scale: Tensor | None, *others: Any) -> Launch:
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
            launch = settled(x, codes, scale, zero, global_scale, bias, format, columns, outputs, activation, addend)
            remember(key, launch)
        return launch(x, codes, scale, zero, global_scale, bias, addend)

    return cpu
