"""Greatest magnitudes, from which most scales are found: row_amax of each group of columns of each row, and
greatest_amax, the greatest of those.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES

PART = 1 << 18
"""Elements that the reference holds in fp32 at a time."""


class AmaxCall(NamedTuple):
    """One call of row_amax or greatest_amax on `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int
    group: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.dtype}, groups of {self.group}"


def describe(x: Tensor, group: int) -> AmaxCall:
    """The table's key of a call."""
    return AmaxCall(x.device.type, machine.isa(), x.dtype, x.shape[0], x.shape[1], group)


def check(x: Tensor, group: int) -> None:
    """ValueError or TypeError, naming the argument, unless x is a matrix of floats and the group at least 1."""
    if x.ndim != 2 or not x.is_floating_point():
        raise TypeError(f"amax: x is {x.dtype} {tuple(x.shape)}; a matrix of floats is needed")
    if group < 1 or x.shape[1] < 1:
        raise ValueError(f"amax: group={group} of {x.shape[1]} columns; at least 1 is needed of both")


def reference(x: Tensor, group: int) -> Tensor:
    """|x| in fp32, padded with zeros to whole groups, and the greatest of each: [N, K] -> fp32 [N, ceil(K / group)]."""
    columns = x.shape[1]
    group = min(group, columns)
    groups = -(-columns // group)
    found = [x.new_zeros((0, groups), dtype=torch.float32)]
    for part in x.split(max(1, PART // columns)):
        padded = torch.nn.functional.pad(part.to(torch.float32).abs(), (0, -columns % group))
        found.append(padded.unflatten(1, (groups, group)).amax(2))
    return torch.cat(found)


def greatest_reference(x: Tensor, group: int) -> Tensor:
    """The greatest of row_amax but NaN, infinities as the greatest fp32 number; 0 of an empty matrix: fp32 [1]."""
    amax = torch.nan_to_num(reference(x, group), nan=0.0, posinf=torch.finfo(torch.float32).max)
    return torch.cat([amax.reshape(-1), amax.new_zeros(1)]).amax(0, keepdim=True)


def _compiled(function: Callable[..., None], greatest: bool = False) -> Callable[..., Tensor]:
    def run(x: Tensor, group: int) -> Tensor:
        x = x.contiguous()
        rows, columns = x.shape
        group = min(group, columns)
        amax = torch.empty((1,) if greatest else (rows, -(-columns // group)), dtype=torch.float32)
        function(x.data_ptr(), amax.data_ptr(), rows, columns, group, TYPES[x.dtype], torch.get_num_threads())
        return amax

    return run


def _refuses(call: AmaxCall) -> str | None:
    return None if call.dtype in TYPES else f"it reads no {call.dtype}"


table.register(
    table.Operation(
        "row_amax",
        describe,
        (
            table.Kernel("amax-avx512", "avx512", _compiled(_C.amax_avx512), _refuses),
            table.Kernel("amax-avx2", "avx2", _compiled(_C.amax_avx2), _refuses),
            table.Kernel("amax-generic", "generic", _compiled(_C.amax_generic), _refuses),
            table.Kernel("amax-torch", table.TORCH, reference),
        ),
    )
)

table.register(
    table.Operation(
        "greatest_amax",
        describe,
        (
            table.Kernel("greatest-amax-avx512", "avx512", _compiled(_C.greatest_avx512, True), _refuses),
            table.Kernel("greatest-amax-avx2", "avx2", _compiled(_C.greatest_avx2, True), _refuses),
            table.Kernel("greatest-amax-generic", "generic", _compiled(_C.greatest_generic, True), _refuses),
            table.Kernel("greatest-amax-torch", table.TORCH, greatest_reference),
        ),
    )
)

LIBRARY.define("row_amax(Tensor x, int group) -> Tensor")
LIBRARY.define("greatest_amax(Tensor x, int group) -> Tensor")


def _fake(x: Tensor, group: int) -> Tensor:
    return x.new_empty((x.shape[0], -(-x.shape[1] // min(group, x.shape[1]))), dtype=torch.float32)


table.implement("row_amax", check, _fake)
table.implement("greatest_amax", check, lambda x, group: x.new_empty((1,), dtype=torch.float32))


def row_amax(x: Tensor, group: int) -> Tensor:
    """Greatest magnitude of every `group` columns of each row of x [N, K]: fp32 [N, ceil(K / group)], NaN where the
    group has a NaN. Raises ValueError or TypeError naming the argument.
    """
    return torch.ops.parco.row_amax.default(x, group)


def greatest_amax(x: Tensor, group: int) -> Tensor:
    """The greatest magnitude in x [N, K] outside groups that have a NaN, infinities as the greatest fp32 number: fp32
    [1]. Raises ValueError or TypeError naming the argument.
    """
    return torch.ops.parco.greatest_amax.default(x, group)
