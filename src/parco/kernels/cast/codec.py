"""Encode and decode, for every format and on any device.

The law: `decode(encode(x, f))` is the nearest number that `f` can write with the block's scale, and encoding that
again with the same scales gives the same codes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parco.formats import Format, ScaleE4M3, TensorSpec, parse
from parco.kernels.cast import codes
from parco.kernels.cast.both import cast_both, fits
from parco.kernels.cast.codes import cast_codes
from parco.kernels.cast.decoding import decode_codes, dequantize
from parco.kernels.cast.hadamard import Hadamard
from parco.kernels.cast.philox import random_bits
from parco.kernels.cast.rounding import Rounding, check_rounding, to_codes
from parco.kernels.cast.rows import cast_rows
from parco.kernels.cast.scaling import find_scales, own_global_scale, poison, rule
from parco.kernels.cast.tiles import block_amax, row_chunks

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor written in a format: `shape` [..., K] of the original, and the `tensors` that `format.tensors`
    describes.

    Leading dimensions are stored as one: the matrix is [N, K] with N their product (1 for a vector).
    """

    format: Format
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __str__(self) -> str:
        return f"Encoded({self.format}, {'x'.join(map(str, self.shape))}, {self.nbytes} bytes)"


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) under which a tensor of `shape` is stored. ValueError without dimensions."""
    if not shape:
        raise ValueError("a tensor without dimensions has no rows: give it the shape (1,)")
    return math.prod(shape[:-1]), shape[-1]


@torch.no_grad()
def encode(
    x: Tensor,
    format: Format | str,
    *,
    rounding: Rounding = "nearest",
    seed: int = 0,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    global_scale: Tensor | None = None,
    hadamard: Hadamard | None = None,
) -> Encoded:
    """`x` [..., K] (fp32, bf16, fp16; fp64 is rounded to fp32 first) written in `format`, on `x`'s device.

    `rounding` is "nearest" (ties to even), "zero" or "stochastic", the last from Philox bits under `seed` that depend
    on an element's row and column alone. `scale`, `zero` and `global_scale`, in the stored shape and dtype, are taken
    instead of the format's own rule. Casts saturate; infinities count as the greatest number (dense formats keep
    them); a NaN makes its block NaN. `hadamard` transforms the rows first: in the same pass where blocks are 16 to 256
    numbers of a row and NVFP4's `global_scale` is given.

    Raises TypeError for an `x` that is not floating point, ValueError for an unknown format or rounding and for
    scales of another shape or dtype than `format.tensors` says.
    """
    format = parse(format)
    check_rounding(rounding)
    if x.dtype not in SOURCE_DTYPES:
        raise TypeError(f"x.dtype={x.dtype}: encode takes float32, bfloat16, float16 or float64")
    shape = matrix_shape(tuple(x.shape))
    matrix = x.detach().reshape(shape)
    given = {"scale": scale, "zero": zero, "global_scale": global_scale}
    if hadamard is not None:
        if not fits(format) or scale is not None or zero is not None or 0 in shape:
            turned = hadamard(x)
            return encode(
                turned, format, rounding=rounding, seed=seed, scale=scale, zero=zero, global_scale=global_scale
            )
        return Encoded(
            format, tuple(x.shape), _cast_transformed(matrix, format, global_scale, rounding, seed, hadamard)
        )
    is_named = format.is_named  # the operations know formats by their names
    if is_named and scale is None and zero is None and rule(format) is not None:
        return Encoded(format, tuple(x.shape), _cast_rows(matrix, format, global_scale, rounding, seed))
    scales = _scales(matrix, format, {name: tensor for name, tensor in given.items() if tensor is not None})
    if format.dtype is not None:
        stored = {"values": _encode_dense(matrix, format, rounding, seed)}
    else:
        tensors = (scales.get("scale"), scales.get("zero"), scales.get("global_scale"))
        if is_named:
            written = cast_codes(matrix, *tensors, str(format), rounding, seed)
        else:
            written = codes.reference(matrix, *tensors, format, rounding, seed)
        stored = {"codes": written, **scales}
    return Encoded(format, tuple(x.shape), {name: stored[name] for name in format.tensors(shape)})


def _cast_rows(
    matrix: Tensor, format: Format, global_scale: Tensor | None, rounding: Rounding, seed: int
) -> dict[str, Tensor]:
    """All tensors of `matrix` [N, K] in one pass, or two for NVFP4, whose first finds the global scale."""
    _check_scales(matrix, format, {} if global_scale is None else {"global_scale": global_scale})
    if isinstance(format.scale, ScaleE4M3) and global_scale is None:
        global_scale = own_global_scale(matrix, format)
    written, found = cast_rows(matrix, global_scale, str(format), rounding, seed)
    tensors = {"codes": written, "scale": found}
    return tensors if global_scale is None else {**tensors, "global_scale": global_scale}


def _cast_transformed(
    matrix: Tensor, format: Format, global_scale: Tensor | None, rounding: Rounding, seed: int, hadamard: Hadamard
) -> dict[str, Tensor]:
    """All tensors of `matrix` [N, K] after a transform of its rows."""
    if isinstance(format.scale, ScaleE4M3) and global_scale is None:
        global_scale = own_global_scale(hadamard(matrix), format)
    written, found = cast_both(
        matrix,
        global_scale,
        None,
        str(format),
        rounding,
        seed,
        transposed=False,
        row_size=hadamard.size,
        sign_seed=hadamard.seed,
    )
    tensors = {"codes": written, "scale": found}
    return tensors if global_scale is None else {**tensors, "global_scale": global_scale}


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `encoded` stands for, in its shape: computed in fp32, then rounded to `dtype`."""
    return decode_tensors(encoded.format, encoded.shape, encoded.tensors, dtype)


@torch.no_grad()
def decode_tensors(
    format: Format | str, shape: tuple[int, ...], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers of a tensor of `shape` [..., K] from its stored tensors, computed in fp32 and rounded to `dtype`.
    Dense values that have this dtype already are returned as they are, not copied.

    ValueError if a tensor is missing or has another shape or dtype than `format.tensors` says.
    """
    format = parse(format)
    matrix = matrix_shape(tuple(shape))
    _check(format, matrix, tensors)
    if format.dtype is not None:
        return tensors["values"].reshape(shape).to(dtype)
    if not format.is_named:
        return dequantize(format, matrix, tensors, dtype).reshape(shape)
    scales = (tensors.get("scale"), tensors.get("zero"), tensors.get("global_scale"))
    return decode_codes(tensors["codes"], *scales, str(format), matrix[1], dtype).reshape(shape)


def _scales(matrix: Tensor, format: Format, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scale tensors of `format`: those given, checked and NaN where a block has a NaN, and the others by its
    rule.
    """
    specs = _check_scales(matrix, format, given)
    if "zero" in given and "scale" not in given:
        raise ValueError("zero= given without scale=: a zero point belongs to a scale")
    scales = dict(given)
    if any(name not in scales for name in specs):
        found = find_scales(matrix, format, given.get("global_scale"))
        scales = {**found, **scales}
        if format.is_asymmetric and "scale" in given and "zero" not in given:
            raise ValueError(f"format {format} is asymmetric: pass zero= with scale=")
    if "scale" in given:
        scales["scale"] = poison(given["scale"], format, torch.isnan(block_amax(matrix, format.block)))
    return scales


def _check_scales(matrix: Tensor, format: Format, given: dict[str, Tensor]) -> dict[str, TensorSpec]:
    """The specs of the format's scale tensors. ValueError unless those given are among them and fit."""
    shape = (matrix.shape[0], matrix.shape[1])
    specs = {name: spec for name, spec in format.tensors(shape).items() if name not in ("values", "codes")}
    for name, tensor in given.items():
        if name not in specs:
            raise ValueError(f"{name}= given, but format {format} has {', '.join(specs) or 'no scales'}")
        if (tuple(tensor.shape), tensor.dtype) != specs[name]:
            wanted = specs[name]
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but format {format} of {shape} needs "
                f"{wanted.dtype} {wanted.shape}"
            )
    return specs


def _encode_dense(matrix: Tensor, format: Format, rounding: Rounding, seed: int) -> Tensor:
    """`matrix` in the dense format's dtype: finite numbers saturate, infinities and NaN stay."""
    assert format.dtype is not None
    limit = torch.finfo(format.dtype).max
    if matrix.dtype == format.dtype:
        return matrix.clone()
    out = torch.empty(matrix.shape, dtype=format.dtype, device=matrix.device)
    for chunk in row_chunks((matrix.shape[0], matrix.shape[1]), format.block):
        x = matrix[chunk.start : chunk.stop].to(torch.float32)
        if rounding == "nearest" or format.dtype == torch.float32:
            rounded = x.clamp(-limit, limit).to(format.dtype)
        else:
            random = random_bits(seed, chunk, matrix.shape[1], device=x.device) if rounding == "stochastic" else None
            rounded = to_codes(x, format.element, rounding, random).to(torch.int16).view(format.dtype)
        out[chunk.start : chunk.stop] = torch.where(torch.isfinite(x), rounded, x.to(format.dtype))
    return out


def _check(format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    for name, spec in format.tensors(shape).items():
        if name not in tensors:
            raise ValueError(f"tensor {name!r} of format {format} is missing (given: {', '.join(tensors) or 'none'})")
        if (tuple(tensors[name].shape), tensors[name].dtype) != spec:
            raise ValueError(
                f"tensor {name!r} is {tensors[name].dtype} {tuple(tensors[name].shape)}, "
                f"but format {format} of {shape} needs {spec.dtype} {spec.shape}"
            )
