"""Encode a tensor's transpose, or the tensor and its transpose from one read."""

import torch
from torch import Tensor

from parco.formats import Format, ScaleE4M3, parse
from parco.kernels.cast.both import cast_both, fits
from parco.kernels.cast.codec import SOURCE_DTYPES, Encoded, encode, matrix_shape
from parco.kernels.cast.hadamard import Hadamard
from parco.kernels.cast.rounding import Rounding, check_rounding
from parco.kernels.cast.scaling import own_global_scale, turned_global_scale


@torch.no_grad()
def encode_transposed(
    x: Tensor,
    format: Format | str,
    *,
    rounding: Rounding = "nearest",
    seed: int = 0,
    global_scale: Tensor | None = None,
    hadamard: Hadamard | None = None,
) -> Encoded:
    """The transpose [K, N] of `x` [..., K], N rows in all, written in `format`: `encode(x.T, ...)` without a copy of
    x.T. `hadamard` transforms it first, along N.

    NVFP4's global scale, where none is given, is the one that `encode` gives to x; after a transform it costs a pass
    of its own. Raises as `encode` does.
    """
    return _encode(x, format, rounding, seed, (None, global_scale), hadamard, straight=False)[-1]


@torch.no_grad()
def encode_both(
    x: Tensor,
    format: Format | str,
    *,
    rounding: Rounding = "nearest",
    seed: int = 0,
    global_scale: Tensor | None = None,
    transposed_scale: Tensor | None = None,
    hadamard: Hadamard | None = None,
) -> tuple[Encoded, Encoded]:
    """`encode(x, ...)` and `encode_transposed(x, ..., hadamard=hadamard)` from one read of `x` [..., K], where the
    format's blocks are 16 to 256 numbers of a row (others are encoded one after the other).

    `global_scale` and `transposed_scale` (fp32 [1]) replace NVFP4's own. Raises as `encode` does.
    """
    first, second = _encode(x, format, rounding, seed, (global_scale, transposed_scale), hadamard, straight=True)
    return first, second


def _encode(
    x: Tensor,
    format: Format | str,
    rounding: Rounding,
    seed: int,
    given: tuple[Tensor | None, Tensor | None],
    hadamard: Hadamard | None,
    straight: bool,
) -> list[Encoded]:
    format = parse(format)
    check_rounding(rounding)
    if x.dtype not in SOURCE_DTYPES:
        raise TypeError(f"x.dtype={x.dtype}: encode takes float32, bfloat16, float16 or float64")
    matrix = x.detach().reshape(matrix_shape(tuple(x.shape)))
    if not fits(format) or 0 in matrix.shape:
        turned = hadamard(matrix.T) if hadamard else matrix.T
        sides = [(x, given[0])] * straight + [(turned, given[1])]
        return [encode(side, format, rounding=rounding, seed=seed, global_scale=scale) for side, scale in sides]
    first, second = given
    if isinstance(format.scale, ScaleE4M3):
        own = None
        if (straight and first is None) or (second is None and hadamard is None):
            own = own_global_scale(matrix, format)
        first = own if straight and first is None else first
        if second is None:
            second = own if hadamard is None else turned_global_scale(matrix, format, hadamard)
    written = cast_both(
        matrix,
        first,
        second,
        str(format),
        rounding,
        seed,
        straight=straight,
        column_size=hadamard.size if hadamard else 0,
        sign_seed=hadamard.seed if hadamard else 0,
    )
    shapes = [tuple(x.shape)] * straight + [(matrix.shape[1], matrix.shape[0])]
    scales = [first] * straight + [second]
    encoded: list[Encoded] = []
    for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        tensors = {"codes": written[2 * i], "scale": written[2 * i + 1]}
        encoded.append(Encoded(format, shape, tensors if scale is None else {**tensors, "global_scale": scale}))
    return encoded
