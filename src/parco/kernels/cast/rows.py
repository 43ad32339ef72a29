"""cast_rows: scales found and codes written in one pass, for blocks that lie within a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import Format, ScaleAbsmax, ScaleE4M3, ScaleE8M0
from parco.kernels import table
from parco.kernels.cast import codes
from parco.kernels.cast.rounding import Rounding, check_rounding
from parco.kernels.cast.scaling import find_scales
from parco.kernels.library import LIBRARY, TYPES


def rule(format: Format) -> str | None:
    """The name in `codes.RULES` of how the format's scales are found, or None where one pass cannot find them."""
    if format.block.rows != 1:
        return None
    match format.scale:
        case ScaleE8M0(name):
            return name
        case ScaleE4M3():
            return "e4m3"
        case ScaleAbsmax(_, power_of_two):
            return None if power_of_two else "absmax"
        case _:
            return None


class RowsCall(NamedTuple):
    """One call of cast_rows on `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int
    format: str
    rounding: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.dtype} to {self.format} with its scales, {self.rounding}"


def describe(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> RowsCall:
    """The table's key of a call."""
    return RowsCall(x.device.type, machine.isa(), x.dtype, x.shape[0], x.shape[1], format, rounding)


def check(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> None:
    """ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if x.ndim != 2 or not x.is_floating_point():
        raise TypeError(f"cast_rows: x is {x.dtype} {tuple(x.shape)}; a matrix of floats is needed")
    check_rounding(rounding)
    form = Format.parse(format)
    if rule(form) is None:
        raise ValueError(f"cast_rows: the scales of format {format} are not found row by row; cast_codes takes them")
    wanted = isinstance(form.scale, ScaleE4M3)
    if (global_scale is not None) != wanted or (
        global_scale is not None and (tuple(global_scale.shape), global_scale.dtype) != ((1,), torch.float32)
    ):
        found = None if global_scale is None else (tuple(global_scale.shape), global_scale.dtype)
        raise ValueError(f"cast_rows: global_scale is {found}; format {format} needs {'fp32 [1]' if wanted else None}")


def reference(
    x: Tensor, global_scale: Tensor | None, format: str, rounding: Rounding, seed: int
) -> tuple[Tensor, Tensor]:
    """The scales by `find_scales`, then the codes under them."""
    scale = find_scales(x, Format.parse(format), global_scale)["scale"]
    return codes.reference(x, scale, None, global_scale, format, rounding, seed), scale


def _compiled(function: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
        form = Format.parse(format)
        spec = form.tensors((x.shape[0], x.shape[1]))["scale"]
        scale = torch.empty(spec.shape, dtype=spec.dtype)
        found = rule(form)
        assert found is not None
        written = codes.launch(function, form, x.contiguous(), scale, None, global_scale, rounding, seed, found)
        return written, scale

    return run


def _refuses(call: RowsCall) -> str | None:
    return None if call.dtype in TYPES else f"it reads no {call.dtype}"


table.register(
    table.Operation(
        "cast_rows",
        describe,
        (
            table.Kernel("cast-rows-avx512", "avx512", _compiled(_C.cast_avx512), _refuses),
            table.Kernel("cast-rows-avx2", "avx2", _compiled(_C.cast_avx2), _refuses),
            table.Kernel("cast-rows-generic", "generic", _compiled(_C.cast_generic), _refuses),
            table.Kernel("cast-rows-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("cast_rows(Tensor x, Tensor? global_scale, str format, str rounding, int seed) -> (Tensor, Tensor)")


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    check(*arguments)
    return reference(*arguments)


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    check(*arguments)
    return table.choose("cast_rows", describe(*arguments)).run(*arguments)


def _fake(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    check(x, global_scale, format, rounding, seed)
    specs = Format.parse(format).tensors((x.shape[0], x.shape[1]))
    written, scale = (x.new_empty(specs[name].shape, dtype=specs[name].dtype) for name in ("codes", "scale"))
    return written, scale


LIBRARY.impl("cast_rows", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("cast_rows", _cpu, "CPU")
torch.library.register_fake("parco::cast_rows", _fake, lib=LIBRARY)


def cast_rows(
    x: Tensor, global_scale: Tensor | None, format: str, rounding: Rounding, seed: int
) -> tuple[Tensor, Tensor]:
    """(codes, scale) of x [N, K] in a format whose blocks lie within a row, scales by the format's own rule.

    `global_scale` fp32 [1] is NVFP4's, None elsewhere; `seed` in [0, 2⁶⁴). Raises ValueError or TypeError naming the
    argument.
    """
    return torch.ops.parco.cast_rows.default(x, global_scale, format, rounding, codes.signed(seed))
