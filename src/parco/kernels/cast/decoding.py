"""decode_codes: the numbers that the codes of a format stand for under their scales."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import E4M3, E5M2, Element, Format, Integer
from parco.kernels import table
from parco.kernels.cast.codes import check_given
from parco.kernels.cast.packing import read_codes, to_bits
from parco.kernels.cast.rounding import from_codes
from parco.kernels.cast.scaling import scale_numbers
from parco.kernels.cast.tiles import row_chunks, scale_rows, spread, tile, untile
from parco.kernels.cast.triton import launch
from parco.kernels.library import LIBRARY, TYPES, scale_type

PATTERNS: dict[Element, int] = {E4M3: 2, E5M2: 3}
"""Elements whose codes C++ converts without looking them up, besides integers (`parco::cast::Pattern`)."""


class DecodeCall(NamedTuple):
    """One call of decode_codes to `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int
    format: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.format}, as {self.dtype}"


def describe(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> DecodeCall:
    """The table's key of a call."""
    return DecodeCall(codes.device.type, machine.isa(), dtype, codes.shape[0], columns, format)


def check(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> None:
    """ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if codes.ndim != 2:
        raise ValueError(f"decode_codes: codes are {codes.dtype} {tuple(codes.shape)}; a matrix of bytes is needed")
    if not dtype.is_floating_point:
        raise TypeError(f"decode_codes: dtype is {dtype}; a float is needed")
    form = Format.parse(format)
    if form.is_dense:
        raise ValueError(f"decode_codes: format {format} is dense and has no codes")
    given = {"codes": codes, "scale": scale, "zero": zero, "global_scale": global_scale}
    what = f"format {format} of {codes.shape[0]}x{columns}"
    check_given(given, form.tensors((codes.shape[0], columns)), "decode_codes", what)


def dequantize(form: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[N, K] numbers from the format's tensors in plain torch, chunk by chunk: code times scale in fp32, rounded to
    `dtype`.
    """
    codes = tensors["codes"]
    scale = scale_numbers(form, tensors)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    for chunk in row_chunks(shape, form.block):
        numbers = read_codes(codes[chunk.start : chunk.stop], form, shape[1])
        part = scale_rows(chunk, form.block)
        if form.is_asymmetric:
            tiles = tile(numbers.to(torch.float32), form.block) - spread(tensors["zero"][part])
        else:
            tiles = tile(from_codes(numbers, form.element), form.block)
        if scale is not None:
            tiles = tiles * spread(scale[part])
        out[chunk.start : chunk.stop] = untile(tiles, (len(chunk), shape[1]))
    return out


def reference(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize` of the tensors that are there."""
    given = {"codes": codes, "scale": scale, "zero": zero, "global_scale": global_scale}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    return dequantize(Format.parse(format), (codes.shape[0], columns), tensors, dtype)


@functools.cache
def element_values(element: Element) -> Tensor:
    """The number of each code, fp32 [2**bits]."""
    return from_codes(torch.arange(1 << element.bits, dtype=torch.int32, device="cpu"), element)


def layout(form: Format, columns: int) -> dict[str, int]:
    """What the compiled kernels are told of the codes of a matrix of `columns` in a format that is not dense."""
    element, group = form.element, max(1, min(form.block.columns or columns, columns))
    return {
        "values": element_values(element).data_ptr(),
        "group": group,
        "scale_stride": -(-columns // group),
        "bits": form.bits,
        "offset": element.offset if isinstance(element, Integer) else 0,
        "pattern": 1 if isinstance(element, Integer) else PATTERNS.get(element, 0),
    }


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(
        codes: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        global_scale: Tensor | None,
        format: str,
        columns: int,
        dtype: torch.dtype,
    ) -> Tensor:
        form = Format.parse(format)
        codes = to_bits(codes, form, columns).contiguous()
        scale = None if scale is None else scale.contiguous()
        zero = None if zero is None else zero.contiguous()
        rows = codes.shape[0]
        numbers = torch.empty(rows, columns, dtype=dtype)
        function(
            codes=codes.data_ptr(),
            scale=0 if scale is None else scale.data_ptr(),
            zero=0 if zero is None else zero.data_ptr(),
            factor=0 if global_scale is None else global_scale.data_ptr(),
            y=numbers.data_ptr(),
            rows=rows,
            columns=columns,
            block_rows=form.block.rows or max(rows, 1),
            y_type=TYPES[dtype],
            scale_type=scale_type(form, scale),
            threads=torch.get_num_threads(),
            **layout(form, columns),
        )
        return numbers

    return run


def _refuses(call: DecodeCall) -> str | None:
    return None if call.dtype in TYPES else f"it writes no {call.dtype}"


def _refuses_triton(call: DecodeCall) -> str | None:
    return launch.refuses_digits(call.format) or _refuses(call)


table.register(
    table.Operation(
        "decode_codes",
        describe,
        (
            table.Kernel("decode-avx512", "avx512", _compiled(_C.decode_avx512), _refuses),
            table.Kernel("decode-avx2", "avx2", _compiled(_C.decode_avx2), _refuses),
            table.Kernel("decode-generic", "generic", _compiled(_C.decode_generic), _refuses),
            table.Kernel("decode-triton", table.TRITON, launch.decode_codes, _refuses_triton),
            table.Kernel("decode-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    "decode_codes(Tensor codes, Tensor? scale, Tensor? zero, Tensor? global_scale, str format, int columns,"
    " ScalarType dtype) -> Tensor"
)


def _fake(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


table.implement("decode_codes", check, _fake)


def decode_codes(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The numbers [N, columns] of stored codes uint8 [N, bytes of a row] in `format` under scales in its stored
    shape and dtype, None for those that it has not: code times scale in fp32, rounded once to `dtype`. Raises
    ValueError or TypeError naming the argument.
    """
    return torch.ops.parco.decode_codes.default(codes, scale, zero, global_scale, format, columns, dtype)
