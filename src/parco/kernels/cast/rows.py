"""cast_rows: scales found and codes written in one pass, for blocks that lie within a row."""

from collections.abc import Callable

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import Format, ScaleE4M3
from parco.kernels import table
from parco.kernels.cast import codes
from parco.kernels.cast.rounding import Rounding, check_rounding
from parco.kernels.cast.scaling import find_scales, rule
from parco.kernels.cast.triton import launch
from parco.kernels.library import LIBRARY


def describe(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> codes.CastCall:
    """The table's key of a call."""
    return codes.CastCall(x.device.type, machine.isa(), x.dtype, x.shape[0], x.shape[1], format, rounding)


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


def _refuses_triton(call: codes.CastCall) -> str | None:
    return launch.refuses_rows(call.format, call.dtype, call.columns)


table.register(
    table.Operation(
        "cast_rows",
        describe,
        (
            table.Kernel("cast-rows-avx512", "avx512", _compiled(_C.cast_avx512), codes.refuses),
            table.Kernel("cast-rows-avx2", "avx2", _compiled(_C.cast_avx2), codes.refuses),
            table.Kernel("cast-rows-generic", "generic", _compiled(_C.cast_generic), codes.refuses),
            table.Kernel("cast-rows-triton", table.TRITON, launch.cast_rows, _refuses_triton),
            table.Kernel("cast-rows-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("cast_rows(Tensor x, Tensor? global_scale, str format, str rounding, int seed) -> (Tensor, Tensor)")


def _fake(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    specs = Format.parse(format).tensors((x.shape[0], x.shape[1]))
    written, scale = (x.new_empty(specs[name].shape, dtype=specs[name].dtype) for name in ("codes", "scale"))
    return written, scale


table.implement("cast_rows", check, _fake, drawn=(4,))


def cast_rows(
    x: Tensor, global_scale: Tensor | None, format: str, rounding: Rounding, seed: int
) -> tuple[Tensor, Tensor]:
    """(codes, scale) of x [N, K] in a format whose blocks lie within a row, scales by the format's own rule.

    `global_scale` fp32 [1] is NVFP4's, None elsewhere; `seed` in [0, 2⁶⁴). Raises ValueError or TypeError naming the
    argument.
    """
    return torch.ops.parco.cast_rows.default(x, global_scale, format, rounding, codes.signed(seed))
