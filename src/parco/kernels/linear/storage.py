"""What the compiled kernels know of a Format: how its codes are read, and what they stand for."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parco import _C
from parco.formats import COLUMN, E3M2, E4M3, E5M2, Element, Float, Format, Integer, ScaleE4M3, ScaleE8M0
from parco.kernels.activations import NONE, NUMBERS
from parco.kernels.library import TYPES, scale_type
from parco.kernels.linear import panels

CONVERTED = {E4M3: 1, E5M2: 2, E3M2: 3}
"""The numbers by which C++ knows elements that it need not look up (`parco::linear::Element`)."""

PACKED_BITS = (2, 3, 4, 5, 6, 8)
"""Widths of codes of which kernels read panels."""

NIBBLE = 4
"""Bits of codes that one vector of floats looks up."""

VECTOR = 16
"""Codes that kernels read at a time: groups of another number are left to the reference."""


@final
@dataclass(frozen=True, eq=False)
class Storage:
    """`values` are the numbers of all codes, fp32 (NumPy's arrays: a tensor would be a fake one where a graph is
    traced). Where they are `unit` times integers within one byte, `integers` says so: the number is then
    (table[code] − zero_point)·unit, or (code − zero_point)·unit without a `table`.
    """

    format: Format
    values: NDArray[np.float32]
    integers: bool
    table: NDArray[np.uint8] | None
    zero_point: int
    unit: float

    @property
    def by_column(self) -> bool:
        """Whether each column of the matrix has one scale, which is then a factor of x."""
        return self.format.block == COLUMN

    @property
    def element(self) -> int:
        """C++'s number of the element."""
        element = self.format.element
        return CONVERTED.get(element, 0) if isinstance(element, Float) else 0

    @property
    def refusal(self) -> str | None:
        """Why no compiled kernel reads the format, or None."""
        group = self.format.block.columns
        if self.by_column:
            return "each column has a zero of its own" if self.format.is_asymmetric else None
        if group is not None and group % VECTOR:
            return f"groups of {group} columns are no multiple of {VECTOR}"
        return None

    def rewrites(self, packed: bool) -> bool:
        """Whether a call writes the codes as bits before kernels read them: rows of digits, unless `packed`."""
        return bool(self.format.per_byte) and not packed

    @property
    def widens(self) -> bool:
        """Whether vectors widen the codes to fp32."""
        return not self.format.is_asymmetric and (self.element != 0 or self.format.bits == NIBBLE)

    @property
    def is_bf16(self) -> bool:
        """Whether numbers times their block's scale are bf16 numbers: those of at most 4 significant bits times a power
        of two or an e4m3 scale.
        """
        return self.table is not None and isinstance(self.format.scale, ScaleE8M0 | ScaleE4M3)

    @property
    def takes_int8(self) -> bool:
        """Whether compiled kernels multiply int8 x by it. A scale per column would have to multiply x first."""
        return self.integers and not self.by_column and self.refusal is None

    def packs(self, shape: tuple[int, int]) -> bool:
        """Whether kernels read panels of a matrix of this format and shape, which are then the faster layout."""
        bits, group = self.format.bits, self.format.block.columns
        if not (self.integers or self.widens) or self.by_column or self.refusal or bits not in PACKED_BITS:
            return False
        return panels.fills(bits, shape[1]) and (group is None or group >= shape[1] or panels.fills(bits, group))


@functools.cache
def storage(name: str) -> Storage:
    """The Storage of the format that `name` names. ValueError for a dense format, or an unknown one."""
    format = Format.parse(name)
    if format.is_dense:
        raise ValueError(f"format={name!r} is dense; linear_dense multiplies it")
    values = _values(format.element)
    if isinstance(format.element, Integer):
        return Storage(format, values, True, None, format.element.offset, 1.0)
    found = _integers(values)
    if found is None:
        return Storage(format, values, False, None, 0, 1.0)
    unit, numbers = found
    zero_point = -int(numbers.min())
    table = np.tile((numbers + zero_point).astype(np.uint8), 64 // numbers.size)
    return Storage(format, values, True, table, zero_point, unit)


def packs(format: Format, shape: tuple[int, int]) -> bool:
    """Whether kernels read panels of a matrix of this format, and faster than its rows."""
    return storage(str(format)).packs(shape)


def takes_int8(format: Format) -> bool:
    """Whether a matrix of this format is multiplied by int8 x: where its numbers are small integers times scales."""
    return not format.is_dense and storage(str(format)).takes_int8


def _values(element: Element) -> NDArray[np.float32]:
    if isinstance(element, Integer):
        return np.arange(element.codes, dtype=np.float32) - np.float32(element.offset)
    return np.array(element.values(), dtype=np.float32)


def _integers(values: NDArray[np.float32]) -> tuple[float, NDArray[np.int32]] | None:
    """(unit, values / unit) where all are integers in units of the least magnitude, at most 6 bits index them and a
    byte holds their span; None elsewhere.
    """
    if values.size > 64 or not np.isfinite(values).all():
        return None
    unit = float(np.abs(values[values != 0]).min())
    numbers = values / unit
    whole = bool((numbers == np.round(numbers)).all()) and math.frexp(unit)[0] == 0.5
    if not whole or numbers.max() - numbers.min() > 255:
        return None
    return unit, numbers.astype(np.int32)


def rows_of(codes: Tensor, outputs: int) -> int:
    """Rows of the matrix: `outputs`, or as many as codes that are no panels have where that is 0."""
    return outputs or codes.shape[0]


def check_tensors(operation: str, name: str, columns: int, outputs: int, tensors: Mapping[str, Tensor | None]) -> None:
    """TypeError or ValueError, naming the argument, unless `tensors` are those of the format for `columns` columns and
    `outputs` rows (0: as many as there are, unless the codes are panels).
    """
    stored = storage(name)
    format = stored.format
    codes = tensors["codes"]
    if columns < 1:
        raise ValueError(f"{operation}: columns={columns}; at least one is needed")
    if codes is None or codes.ndim not in (2, 3):
        raise ValueError(
            f"{operation}: codes has the shape {None if codes is None else tuple(codes.shape)}; a matrix is needed, or "
            "its panels"
        )
    packed = panels.is_packed(codes)
    if outputs < 0 or (packed and outputs == 0):
        raise ValueError(f"{operation}: outputs={outputs}; packed codes need the number of rows")
    shape = (rows_of(codes, outputs), columns)
    if packed and not stored.packs(shape):
        raise ValueError(f"{operation}: codes are packed; no kernel reads panels of {name} {shape[0]}x{columns}")
    specs = panels.specs(format, shape) if packed else format.tensors(shape)
    for argument, tensor in tensors.items():
        spec = specs.get(argument)
        if spec is None:
            if tensor is not None:
                raise ValueError(f"{operation}: {argument} is given, but format {name} has none")
        elif tensor is None:
            raise ValueError(f"{operation}: {argument} is missing; format {name} has one")
        elif tensor.dtype != spec.dtype:
            raise TypeError(f"{operation}: {argument} is {tensor.dtype}; format {name} has {spec.dtype}")
        elif tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"{operation}: {argument} has the shape {tuple(tensor.shape)}; format {name} of "
                f"{shape[0]}x{columns} has {spec.shape}{' in panels' if packed else ''}"
            )


def settle(
    storage: Storage,
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: bool,
    int8: bool = False,
    activation: str = NONE,
    addend_type: int = 0,
) -> _C.CodedCall:
    """What the compiled kernels are told of a call but for its tensors: `rows` x (or results) of `dtype` against
    `outputs` by `columns` codes, by rows or `packed` in panels; `int8` says
    that x is quantized first, `activation` and the addend's type what follows. Without `scale` the codes stand for
    their numbers. It keeps addresses of `storage`, which lives as long as the interpreter.
    """
    block, values, table = storage.format.block, storage.values, storage.table
    group = columns if scale is None or block.columns is None else min(block.columns, columns)
    return _C.CodedCall(
        values=values.ctypes.data,
        table=0 if table is None else table.ctypes.data,
        rows=rows,
        outputs=outputs,
        columns=columns,
        group=group,
        block_rows=outputs if scale is None or block.rows is None else block.rows,
        scale_stride=0 if scale is None else -(-columns // group),
        unit=storage.unit,
        zero_point=storage.zero_point,
        bits=storage.format.bits,
        packed=packed,
        int8=int8,
        element=storage.element,
        x_type=TYPES[dtype],
        scale_type=scale_type(storage.format, scale),
        bias_type=0 if bias is None else TYPES[bias.dtype],
        activation=NUMBERS[activation],
        addend_type=addend_type,
    )
