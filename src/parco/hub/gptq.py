"""Matrices as GPTQ's and AWQ's libraries store them, which lay them out by columns of x.

| tensor | GPTQ | AWQ (gemm) |
| --- | --- | --- |
| qweight, int32 | [⌈K·bits/32⌉, N], each column a stream of codes, lowest bit first | [K, N/8] |
| qzeros, int32 | [G, ⌈N·bits/32⌉], each row a stream | [G, N/8] |
| scales | [G, N] | [G, N] |
| g_idx, int32 | [K], the group of each column of x; 0, 0, …, 1, 1, … where it says nothing | |

A number is (code − zero)·scale. A word of AWQ holds 8 columns in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ's first
checkpoint format stores zero − 1, subtracted from whole words (which borrow), of 3 bits from each zero by itself;
"gptq_v2" stores zero. The stream of a column of GPTQ is a row of parco's codes. Sources: GPTQModel's
`nn_modules/qlinear` and `utils/model.py`, AutoAWQ's `modules/linear/gemm.py`.

Where the groups of GPTQ are no neighbouring columns (`desc_act`), no Format holds them: the matrix is dense, in the
model's dtype, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parco.formats import DTYPE_NAMES, ROW, Block, Format, ScaleAbsmax, ScaleRange, group, integer
from parco.hub.foreign import Matrix, given, is_in_order, shaped
from parco.kernels.cast import pack, unpack
from parco.nn import Site
from parco.weights import Quantized

_BITS = (2, 3, 4, 8)
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's eight codes column i of AWQ is."""

_PARTS = frozenset(("qweight", "qzeros", "scales", "g_idx"))


class Gptq:
    """The layout of GPTQ's libraries, by their `quantization_config` or quantize_config.json. ValueError for a
    checkpoint format that parco does not read.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        written = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
        if written not in ("gptq", "gptq_v2"):
            raise ValueError(f"its checkpoint_format is {written!r}; parco reads 'gptq' and 'gptq_v2'")
        self._minus_one = written == "gptq"
        self._varies = bool(settings.get("dynamic"))
        self._bits: Any = settings.get("bits")
        if not self._varies and (type(self._bits) is not int or self._bits not in _BITS):
            raise ValueError(f"its bits are {self._bits!r}; parco reads {', '.join(map(str, _BITS))}")
        self._group_size = _group_size(settings.get("group_size"))
        self._reordered = 0

    @property
    def parts(self) -> frozenset[str]:
        return _PARTS

    def matrix(self, name: str, where: Site, parts: Mapping[str, Tensor]) -> Matrix | Tensor:
        rows, columns = where.shape
        _refuse_second(parts)
        bits = self._bits_of(given(parts, "qweight"), columns)
        words = shaped(parts, "qweight", (-(-columns * bits // 32), rows), torch.int32)
        stream = words.t().contiguous().view(torch.uint8)[:, : -(-columns * bits // 8)].contiguous()
        scale = _scales(parts, rows)
        groups = scale.shape[1]
        packed = shaped(parts, "qzeros", (groups, -(-rows * bits // 32)), torch.int32)
        zero = self._zeros(packed, bits, rows)
        order = parts.get("g_idx")
        size = _size(columns, groups, None if self._varies else self._group_size)
        if order is not None and not is_in_order(order := _order(order, columns, groups), size):
            codes = unpack(stream, bits, columns).float()
            self._reordered += 1
            dense = (codes - zero[:, order].float()) * scale[:, order].float()
            return dense.t() if where.kind == "conv1d" else dense
        return _matrix((rows, columns), bits, ROW if self._group_size == -1 else group(size), stream, scale, zero)

    def _bits_of(self, words: Tensor, columns: int) -> int:
        bits, left = divmod(words.shape[0] * 32, columns) if words.ndim == 2 else (0, 1)
        if left or bits not in _BITS or (bits != self._bits and not self._varies):
            raise ValueError(
                f"qweight: it is {tuple(words.shape)} for {columns} columns of x, and the configuration says"
                f" bits={self._bits!r} (parco reads {', '.join(map(str, _BITS))})"
            )
        return bits

    def _zeros(self, words: Tensor, bits: int, rows: int) -> Tensor:
        """uint8 [N, G]."""
        one = sum(1 << shift for shift in range(0, 32, bits)) if self._minus_one and bits != 3 else 0
        whole = (words.long() + one).to(torch.int32).contiguous().view(torch.uint8)
        zero = unpack(whole[:, : -(-rows * bits // 8)], bits, rows)
        if self._minus_one and bits == 3:
            zero = (zero + 1) & 7
        return zero.t().contiguous()

    def notes(self) -> tuple[str, ...]:
        if not self._reordered:
            return ()
        return (
            f"{self._reordered} matrices have groups of columns in the order of activations (desc_act), for which parco"
            " has no format: they are dense here, in the model's dtype",
        )


class Awq:
    """The layout of AutoAWQ's version "gemm", by its `quantization_config` or quant_config.json. ValueError for
    another.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        version = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm")
        if version.lower() != "gemm":
            raise ValueError(f"its version is {version!r}; parco reads 'gemm'")
        bits = settings.get("bits", settings.get("w_bit", 4))
        if bits != 4:
            raise ValueError(f"its bits are {bits!r}; AWQ's version 'gemm' has 4")
        self._group_size = _group_size(settings.get("group_size", settings.get("q_group_size")))

    @property
    def parts(self) -> frozenset[str]:
        return _PARTS

    def matrix(self, name: str, where: Site, parts: Mapping[str, Tensor]) -> Matrix:
        rows, columns = where.shape
        _refuse_second(parts)
        if rows % 8:
            raise ValueError(f"qweight: {rows} outputs are no whole number of words of 8")
        codes = _in_order(shaped(parts, "qweight", (columns, rows // 8), torch.int32))
        scale = _scales(parts, rows)
        zero = _in_order(shaped(parts, "qzeros", (scale.shape[1], rows // 8), torch.int32))
        size = _size(columns, scale.shape[1], self._group_size)
        block = ROW if self._group_size == -1 else group(size)
        return _matrix((rows, columns), 4, block, pack(codes, 4), scale, zero)

    def notes(self) -> tuple[str, ...]:
        return ()


def _in_order(words: Tensor) -> Tensor:
    """int32 [R, N/8] -> the codes of each word in the order of columns, uint8 [N, R]."""
    codes = unpack(words.contiguous().view(torch.uint8), 4, words.shape[1] * 8)
    return codes.reshape(len(words), -1, 8)[..., list(_ORDER)].flatten(1).t().contiguous()


def _scales(parts: Mapping[str, Tensor], rows: int) -> Tensor:
    """[N, G]."""
    scale = given(parts, "scales")
    groups = max(scale.shape[0], 1) if scale.ndim == 2 else 1
    return shaped(parts, "scales", (groups, rows), *DTYPE_NAMES).t().contiguous()


def _group_size(found: Any) -> int | None:
    """The configuration's group_size: columns of x, -1 for all of them, or None. ValueError for anything else."""
    if found is not None and (type(found) is not int or (found < 1 and found != -1)):
        raise ValueError(f"its group_size is {found!r}; a number of columns, or -1 for all of them, is needed")
    return found


def _refuse_second(parts: Mapping[str, Tensor]) -> None:
    if "weight" in parts:
        raise ValueError("weight: the file has qweight of this layer besides, and only one of them can be its matrix")


def _size(columns: int, groups: int, told: int | None) -> int:
    """Columns in each of `groups`; ValueError where they are not of one size, or not those of the group_size `told`."""
    size, left = divmod(columns, groups)
    if left:
        raise ValueError(f"scales: {columns} columns do not make {groups} groups of one size")
    if told not in (None, -1) and groups != -(-columns // told):
        raise ValueError(
            f"scales: there are {groups} groups of {columns} columns, and group_size={told} says otherwise"
        )
    return size


def _order(groups: Tensor, columns: int, count: int) -> Tensor:
    if groups.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"g_idx: it is {groups.dtype}, and must be torch.int32")
    order = groups.long()
    if tuple(order.shape) != (columns,) or int(order.min()) < 0 or int(order.max()) >= count:
        raise ValueError(
            f"g_idx: it is {tuple(order.shape)}, and must name one of {count} groups for {columns} columns"
        )
    return order


def _matrix(shape: tuple[int, int], bits: int, block: Block, codes: Tensor, scale: Tensor, zero: Tensor) -> Matrix:
    """The Weight of these codes, symmetric where every zero is the middle code."""
    symmetric = bool((zero == 1 << (bits - 1)).all())
    if block == ROW and scale.shape[1] != 1:
        raise ValueError(f"scales: there are {scale.shape[1]} groups, and group_size=-1 says that a row is one")
    spec = Quantized(Format(integer(bits), block, (ScaleAbsmax if symmetric else ScaleRange)(scale.dtype)), shape)
    return Matrix(spec, (codes, scale) if symmetric else (codes, scale, zero))
