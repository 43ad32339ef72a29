"""cast_both: a matrix cast by rows and its transpose by rows, in one read, each after a Hadamard transform or not.

What the products of a training step need: `output = x·Wᵀ` reads x in blocks along its columns, `grad_weight = gᵀ·x` in
blocks along its rows.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import Format, ScaleE4M3
from parco.kernels import table
from parco.kernels.cast import codes, rows
from parco.kernels.cast.hadamard import check_size, signs, transform
from parco.kernels.cast.rounding import Rounding, check_rounding
from parco.kernels.cast.scaling import rule
from parco.kernels.cast.triton import launch
from parco.kernels.library import LIBRARY

GROUPS = (16, 32, 64, 128, 256)
"""Widths of blocks that lie within a tile of the kernels."""


def fits(format: Format) -> bool:
    """Whether one pass can find the format's scales by rows and by columns."""
    return format.is_named and rule(format) is not None and format.block.columns in GROUPS


def describe(
    x: Tensor,
    global_scale: Tensor | None,
    transposed_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
    straight: bool,
    transposed: bool,
    row_size: int,
    column_size: int,
    sign_seed: int,
) -> codes.CastCall:
    """The table's key of a call."""
    return codes.CastCall(x.device.type, machine.isa(), x.dtype, x.shape[0], x.shape[1], format, rounding)


def check(
    x: Tensor,
    global_scale: Tensor | None,
    transposed_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
    straight: bool,
    transposed: bool,
    row_size: int,
    column_size: int,
    sign_seed: int,
) -> None:
    """ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if x.ndim != 2 or not x.is_floating_point():
        raise TypeError(f"cast_both: x is {x.dtype} {tuple(x.shape)}; a matrix of floats is needed")
    if 0 in x.shape:
        raise ValueError(f"cast_both: x is {tuple(x.shape)}; a matrix with rows and columns is needed")
    if not (straight or transposed):
        raise ValueError("cast_both: neither straight nor transposed; at least one is needed")
    check_rounding(rounding)
    form = Format.parse(format)
    if not fits(form):
        raise ValueError(f"cast_both: the blocks of format {format} are not of 16 to 256 numbers of a row")
    for name, size, length in (("row_size", row_size, x.shape[1]), ("column_size", column_size, x.shape[0])):
        if size:
            check_size(f"cast_both: {name}", size)
            if length % size:
                raise ValueError(f"cast_both: {name}={size} does not divide {length}, of x {tuple(x.shape)}")
    if row_size and column_size and row_size != column_size:
        raise ValueError(f"cast_both: row_size={row_size} and column_size={column_size}; one size is needed")
    wanted = isinstance(form.scale, ScaleE4M3)
    given = (("global_scale", global_scale, straight), ("transposed_scale", transposed_scale, transposed))
    for name, tensor, is_written in given:
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        needed = ((1,), torch.float32) if wanted and is_written else None
        if found != needed:
            raise ValueError(f"cast_both: {name} is {found}; format {format} needs {needed}")


def reference(
    x: Tensor,
    global_scale: Tensor | None,
    transposed_scale: Tensor | None,
    format: str,
    rounding: Rounding,
    seed: int,
    straight: bool,
    transposed: bool,
    row_size: int,
    column_size: int,
    sign_seed: int,
) -> list[Tensor]:
    """One cast after the other, each of its own copy."""
    written: list[Tensor] = []
    sides = ((x, global_scale, straight, row_size), (x.T.contiguous(), transposed_scale, transposed, column_size))
    for matrix, scale, is_written, size in sides:
        if is_written:
            numbers = transform(matrix, size, sign_seed % (1 << 64)) if size else matrix
            written += rows.reference(numbers, scale, format, rounding, seed)
    return written


def _new(x: Tensor, format: Format, straight: bool, transposed: bool) -> list[Tensor]:
    """The tensors that are written."""
    shape = (x.shape[0], x.shape[1])
    sides = [shape] * straight + [(shape[1], shape[0])] * transposed
    specs = [format.tensors(side)[name] for side in sides for name in ("codes", "scale")]
    return [x.new_empty(spec.shape, dtype=spec.dtype) for spec in specs]


_held_signs = functools.lru_cache(maxsize=256)(signs)


def _compiled(function: Callable[..., None]) -> Callable[..., list[Tensor]]:
    def run(
        x: Tensor,
        global_scale: Tensor | None,
        transposed_scale: Tensor | None,
        format: str,
        rounding: str,
        seed: int,
        straight: bool,
        transposed: bool,
        row_size: int,
        column_size: int,
        sign_seed: int,
    ) -> list[Tensor]:
        form = Format.parse(format)
        found = rule(form)
        assert found is not None
        x = x.contiguous()
        written = _new(x, form, straight, transposed)
        shape = (x.shape[0], x.shape[1])
        # A side that is not written has no codes, and a scale only so that there is one.
        by_rows = (written[0] if straight else None, written[1])
        by_columns = (written[-2] if transposed else None, written[-1])
        turned = (x.shape[1], x.shape[0])
        size = row_size or column_size
        function(
            codes.prepare(form, x, shape, *by_rows, None, global_scale, rounding, seed, found),
            codes.prepare(form, x, turned, *by_columns, None, transposed_scale, rounding, seed, found),
            row_size,
            column_size,
            _held_signs(size, sign_seed % (1 << 64)).data_ptr() if size else 0,
        )
        return written

    return run


def _refuses_triton(call: codes.CastCall) -> str | None:
    return launch.refuses_both(call.format, call.dtype)


table.register(
    table.Operation(
        "cast_both",
        describe,
        (
            table.Kernel("cast-both-avx512", "avx512", _compiled(_C.tiles_avx512), codes.refuses),
            table.Kernel("cast-both-avx2", "avx2", _compiled(_C.tiles_avx2), codes.refuses),
            table.Kernel("cast-both-generic", "generic", _compiled(_C.tiles_generic), codes.refuses),
            table.Kernel("cast-both-triton", table.TRITON, launch.cast_both, _refuses_triton),
            table.Kernel("cast-both-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    "cast_both(Tensor x, Tensor? global_scale, Tensor? transposed_scale, str format, str rounding, int seed,"
    " bool straight, bool transposed, int row_size, int column_size, int sign_seed) -> Tensor[]"
)


def _fake(
    x: Tensor,
    global_scale: Tensor | None,
    transposed_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
    straight: bool,
    transposed: bool,
    row_size: int,
    column_size: int,
    sign_seed: int,
) -> list[Tensor]:
    return _new(x, Format.parse(format), straight, transposed)


table.implement("cast_both", check, _fake, drawn=(5, 10))


def cast_both(
    x: Tensor,
    global_scale: Tensor | None,
    transposed_scale: Tensor | None,
    format: str,
    rounding: Rounding,
    seed: int,
    straight: bool = True,
    transposed: bool = True,
    row_size: int = 0,
    column_size: int = 0,
    sign_seed: int = 0,
) -> list[Tensor]:
    """Codes and scale of x [N, K], if `straight`, then those of its transpose [K, N], if `transposed`, in a format of
    blocks of 16 to 256 numbers of a row, in one read of x.

    A Hadamard transform of `row_size` numbers along x's rows goes before the first, one of `column_size` along its
    columns before the second (0: none), signs from `sign_seed`. The global scales, fp32 [1], are NVFP4's. Raises
    ValueError or TypeError naming the argument.
    """
    return torch.ops.parco.cast_both.default(
        x,
        global_scale,
        transposed_scale,
        format,
        rounding,
        codes.signed(seed),
        straight,
        transposed,
        row_size,
        column_size,
        codes.signed(sign_seed),
    )
