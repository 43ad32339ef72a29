"""cast_codes: numbers into the codes of a format, under scales that are there."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import Block, Element, Float, Format, Integer, ScaleE4M3, ScaleE8M0, Table, TensorSpec, parse
from parco.kernels import table
from parco.kernels.cast.packing import of_bits, write_codes
from parco.kernels.cast.philox import random_bits
from parco.kernels.cast.rounding import ROUNDINGS, Rounding, check_rounding, round_integers, to_codes
from parco.kernels.cast.scaling import greatest, scale_numbers, scale_reciprocals
from parco.kernels.cast.tiles import row_chunks, scale_rows, spread, tile, untile
from parco.kernels.cast.triton import launch as on_cuda
from parco.kernels.library import LIBRARY, TYPES, scale_type


class CastCall(NamedTuple):
    """One call of cast_codes or cast_rows on `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int
    format: str
    rounding: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.dtype} to {self.format}, {self.rounding}"


def describe(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
) -> CastCall:
    """The table's key of a call."""
    return CastCall(x.device.type, machine.isa(), x.dtype, x.shape[0], x.shape[1], format, rounding)


def check(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
) -> None:
    """ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if x.ndim != 2 or not x.is_floating_point():
        raise TypeError(f"cast_codes: x is {x.dtype} {tuple(x.shape)}; a matrix of floats is needed")
    check_rounding(rounding)
    form = Format.parse(format)
    if form.is_dense:
        raise ValueError(f"cast_codes: format {format} is dense and has no codes")
    given = {"scale": scale, "zero": zero, "global_scale": global_scale}
    check_given(given, form.tensors((x.shape[0], x.shape[1])), "cast_codes", f"format {format} of {tuple(x.shape)}")


def check_given(given: Mapping[str, Tensor | None], specs: Mapping[str, TensorSpec], operation: str, what: str) -> None:
    """ValueError, naming the tensor, unless each has the shape and dtype that `what` needs, or is None."""
    for name, tensor in given.items():
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if found != specs.get(name):
            raise ValueError(f"{operation}: {name} is {found}; {what} needs {specs.get(name)}")


def reference(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str | Format,
    rounding: Rounding,
    seed: int,
) -> Tensor:
    """Packed codes of `x` [N, K], chunk by chunk."""
    form = parse(format)
    given = {"scale": scale, "zero": zero, "global_scale": global_scale}
    scales = {name: tensor for name, tensor in given.items() if tensor is not None}
    shape = (x.shape[0], x.shape[1])
    spec = form.tensors(shape)["codes"]
    out = torch.empty(spec.shape, dtype=spec.dtype, device=x.device)
    rescale = _rescaling(form, scales)
    for chunk in row_chunks(shape, form.block):
        numbers = x[chunk.start : chunk.stop].to(torch.float32)
        part = scale_rows(chunk, form.block)
        chunk_shape = (len(chunk), shape[1])
        if rescale is not None:
            numbers = untile(rescale(tile(numbers, form.block), part), chunk_shape)
        random = random_bits(seed % (1 << 64), chunk, shape[1], device=x.device) if rounding == "stochastic" else None
        if isinstance(form.element, Integer) and form.is_asymmetric:
            offset = per_element(scales["zero"][part], form.block, chunk_shape)
            rounded = round_integers(numbers, rounding, random).add_(offset)
            codes = rounded.clamp_(0, form.element.codes - 1).to(torch.uint8)
        else:
            codes = to_codes(numbers, form.element, rounding, random)
        out[chunk.start : chunk.stop] = write_codes(codes, form)
    return out


def _rescaling(format: Format, scales: dict[str, Tensor]) -> Callable[[Tensor, slice], Tensor] | None:
    """Brings tiles under the scales of `part` into the element's range (0 under a scale of 0); None if unscaled."""
    reciprocals = scale_reciprocals(format, scales)
    if reciprocals is not None:
        return lambda tiles, part: tiles * spread(reciprocals[part])
    numbers = scale_numbers(format, scales)
    if numbers is None:
        return None
    divisors = torch.where(numbers == 0, torch.inf, numbers)
    return lambda tiles, part: tiles / spread(divisors[part])


def per_element(scale: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """[R, C] -> [n, K]: each block's number at each of its elements."""
    height, width = block.rows or shape[0], block.columns or shape[1]
    return scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def _element_numbers(element: Element) -> dict[str, int]:
    """What csrc/cast/cast.h says of an element."""
    numbers = dict.fromkeys(
        ("mantissa_bits", "least_exponent", "max_code", "nan_code", "greatest_exponent", "least", "greatest", "offset"),
        0,
    )
    match element:
        case Float():
            return numbers | {
                "kind": 0,
                "mantissa_bits": element.mantissa_bits,
                "least_exponent": element.least_exponent,
                "max_code": element.max_code,
                "nan_code": -1 if element.nan_code is None else element.nan_code,
                "greatest_exponent": element.greatest_exponent,
            }
        case Integer():
            return numbers | {
                "kind": 1,
                "least": element.least,
                "greatest": element.greatest,
                "offset": element.offset,
            }
        case Table():
            return numbers | {"kind": 2}


RULES: dict[str, int] = {"given": 0, "absmax": 1, "floor": 2, "ceil": 3, "even": 4, "rceil": 5, "e4m3": 6}
"""The numbers by which C++ knows how a scale is found (`parco::cast::Rule`)."""


def prepare(
    form: Format,
    x: Tensor,
    shape: tuple[int, int],
    codes: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    rounding: str,
    seed: int,
    rule: str = "given",
) -> _C.CastCall:
    """The cast of `shape` numbers to `codes` as C++ takes it: tensors by their addresses, so they have to outlive it.
    All are contiguous; `scale` is written unless it is given.
    """
    rows, columns = shape
    entries = _entries(form.element) if isinstance(form.element, Table) else None
    group = min(form.block.columns or columns, columns)
    return _C.cast_call(
        x=x.data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        zero=0 if zero is None else zero.data_ptr(),
        factor=0 if global_scale is None else global_scale.data_ptr(),
        entries=0 if entries is None else entries.data_ptr(),
        codes=0 if codes is None else codes.data_ptr(),
        rows=rows,
        columns=columns,
        group=group,
        block_rows=form.block.rows or max(rows, 1),
        scale_stride=-(-columns // group),
        seed=seed % (1 << 64),
        rule=RULES[rule],
        rounding=ROUNDINGS.index(cast(Rounding, rounding)),
        rescaling=0 if scale is None else 1 if isinstance(form.scale, ScaleE8M0 | ScaleE4M3) else 2,
        bits=form.bits,
        largest=greatest(form.element),
        x_type=TYPES[x.dtype],
        scale_type=scale_type(form, scale),
        threads=torch.get_num_threads(),
        **_element_numbers(form.element),
    )


@functools.cache
def _entries(element: Table) -> Tensor:
    return torch.tensor(element.entries, dtype=torch.float32, device="cpu")


def launch(
    function: Callable[[_C.CastCall], None],
    form: Format,
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    rounding: str,
    seed: int,
    rule: str = "given",
) -> Tensor:
    """Run a compiled cast and return the codes. All tensors are contiguous; `scale` is written unless it is given."""
    shape = (x.shape[0], x.shape[1])
    written = torch.empty(shape[0], form.bit_bytes(shape[1]), dtype=torch.uint8)
    function(prepare(form, x, shape, written, scale, zero, global_scale, rounding, seed, rule))
    return of_bits(written, form, shape[1])


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        global_scale: Tensor | None,
        format: str,
        rounding: str,
        seed: int,
    ) -> Tensor:
        scale = None if scale is None else scale.contiguous()
        zero = None if zero is None else zero.contiguous()
        return launch(function, Format.parse(format), x.contiguous(), scale, zero, global_scale, rounding, seed)

    return run


def refuses(call: CastCall) -> str | None:
    """Why no compiled cast reads the numbers, or None."""
    return None if call.dtype in TYPES else f"it reads no {call.dtype}"


def _refuses_triton(call: CastCall) -> str | None:
    return on_cuda.refuses_codes(call.format, call.dtype)


table.register(
    table.Operation(
        "cast_codes",
        describe,
        (
            table.Kernel("cast-avx512", "avx512", _compiled(_C.cast_avx512), refuses),
            table.Kernel("cast-avx2", "avx2", _compiled(_C.cast_avx2), refuses),
            table.Kernel("cast-generic", "generic", _compiled(_C.cast_generic), refuses),
            table.Kernel("cast-triton", table.TRITON, on_cuda.cast_codes, _refuses_triton),
            table.Kernel("cast-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    "cast_codes(Tensor x, Tensor? scale, Tensor? zero, Tensor? global_scale, str format, str rounding, int seed)"
    " -> Tensor"
)


def _fake(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
) -> Tensor:
    spec = Format.parse(format).tensors((x.shape[0], x.shape[1]))["codes"]
    return x.new_empty(spec.shape, dtype=spec.dtype)


table.implement("cast_codes", check, _fake, drawn=(6,))


def cast_codes(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rounding: Rounding,
    seed: int,
) -> Tensor:
    """The stored codes uint8 [N, bytes of a row] of x [N, K] in `format` under scales in its stored shape and dtype,
    None for those that it has not. `seed` in [0, 2⁶⁴). Raises ValueError or TypeError naming the argument.
    """
    return torch.ops.parco.cast_codes.default(x, scale, zero, global_scale, format, rounding, signed(seed))


def signed(seed: int) -> int:
    """The seed as operations take it, a signed word. ValueError outside [0, 2⁶⁴)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed}: must lie in [0, 2**64)")
    return seed - (1 << 64) if seed >= 1 << 63 else seed
