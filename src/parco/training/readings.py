"""What is read off the operands of a layer's products while a step that is watched runs.

Readings are taken of what the products multiply, within the layer's own forward and backward. They draw no random
bits and change no tensor, so a step is the same, bit for bit, watched or not. Of each operand some `ROWS` rows are
compared with what was written of them, in bands that are evenly spread: comparing all would cost as much as the step.
The greatest magnitude is that of all numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parco.kernels.cast import Encoded, Hadamard
from parco.kernels.cast.amax import row_amax
from parco.kernels.cast.scaling import greatest
from parco.training.operands import Written, padded, units, write
from parco.training.recipe import FACTORS, PRODUCTS, Operand, ProductName, Role

ROWS = 64
BAND = 8
"""Rows of a transposed operand that are read together: they lie beside one another in memory."""
KINDS = ("snr_db", "underflow", "saturated", "amax")
PLACES: tuple[tuple[ProductName, Role], ...] = tuple((name, role) for name in PRODUCTS for role in FACTORS[name])
"""The six operands of a layer."""

SUMS = 6
"""Squares of the numbers, squares of the errors, all numbers, those that are not 0, of these lost, all beyond."""


@dataclass(frozen=True)
class Reading:
    """One operand of one product of one layer, over the tokens of a step.

    `written` is the operand's text. `snr_db` is 10 log10 of the sum of squares over that of the errors of the cast,
    infinite where nothing is lost. `underflow` is the share of the numbers other than 0 that became 0, `saturated` the
    share that lies beyond the greatest number that the format has under their scale (those that are at it are one a
    block by construction, and are not counted). Under a Hadamard transform the three are of the transformed numbers.
    `amax` is the greatest magnitude before clamping and transform; gradients are as the loss scale left them.
    """

    layer: str
    product: ProductName
    operand: Role
    written: str
    snr_db: float
    underflow: float
    saturated: float
    amax: float


@dataclass(frozen=True)
class Readings:
    """All readings of one step, whose number counts from 1, and the norm of the gradient of each layer's weight."""

    step: int
    operands: tuple[Reading, ...]
    grad_norms: dict[str, float]

    def scalars(self, prefix: str = "watch") -> dict[str, float]:
        """Numbers by name: `watch/<layer>/<product>/<operand>/snr_db` and so on, `watch/<layer>/grad_norm`."""
        found = {
            f"{prefix}/{each.layer}/{each.product}/{each.operand}/{kind}": float(getattr(each, kind))
            for each in self.operands
            for kind in KINDS
        }
        return found | {f"{prefix}/{layer}/grad_norm": norm for layer, norm in self.grad_norms.items()}

    def __str__(self) -> str:
        """The ten noisiest operands, the noisiest first."""
        worst = sorted(self.operands, key=lambda each: each.snr_db)[:10]
        lines = [
            f"{each.snr_db:6.1f} dB  {each.underflow:6.1%} lost  {each.saturated:6.1%} beyond  amax {each.amax:8.2e}  "
            f"{each.layer} {each.product} {each.operand} ({each.written})"
            for each in worst
        ]
        return "\n".join([f"step {self.step}: {len(self.operands)} operands, the noisiest", *lines])


class Sums:
    """What one layer's operands add up to during a step, whose backward may run in several parts."""

    def __init__(self) -> None:
        self.sums: dict[tuple[ProductName, Role], Tensor] = {}
        self.amax: dict[tuple[ProductName, Role], Tensor] = {}

    def add(self, product: ProductName, role: Role, x: Tensor, written: Written, operand: Operand, **how: Any) -> None:
        """Takes in that `x` was `written` as `operand` (`how`: `transposed` and `sign_seed`, as for `write`)."""
        if x.numel():
            self._add((product, role), x, compared(operand, x, written, **how))

    def add_bytes(self, product: ProductName, role: Role, x: Tensor, operand: Operand, *, transposed: bool) -> None:
        """As `add`, where the product itself rounds the rows of `x`, which know nothing of one another."""
        if x.numel():
            picked = spread_out(x.shape[1 if transposed else 0], BAND if transposed else 1, x.device)
            rows = _rows(x, picked, transposed)
            self._add((product, role), x, compared(operand, rows, write(operand, rows)))

    def _add(self, place: tuple[ProductName, Role], x: Tensor, found: Tensor) -> None:
        amax = row_amax(x, x.shape[1]).amax().to(torch.float64)
        self.sums[place] = self.sums[place] + found if place in self.sums else found
        self.amax[place] = torch.maximum(self.amax[place], amax) if place in self.amax else amax


class Probe:
    """Where a layer's products look whether they are watched: `sums` is None on all steps but these.

    A copy of a layer is watched by nobody.
    """

    def __init__(self) -> None:
        self.sums: Sums | None = None

    def __reduce__(self) -> tuple[type[Probe], tuple[()]]:
        return Probe, ()


def spread_out(rows: int, height: int, device: torch.device) -> Tensor:
    """About `ROWS` of `rows` rows in whole bands of `height`, evenly spread: int64."""
    bands = -(-rows // height)
    count = min(bands, max(1, ROWS // height))
    starts = torch.arange(count, device=device) * bands // count * height
    picked = (starts[:, None] + torch.arange(height, device=device)).reshape(-1)
    return picked[picked < rows]


def compared(operand: Operand, x: Tensor, written: Written, *, transposed: bool = False, sign_seed: int = 0) -> Tensor:
    """The `SUMS` sums over some rows of an operand [M, R] that `write` made of `x`: fp64."""
    encoded = written.encoded
    height = encoded.format.block.rows or 1
    height = math.lcm(height, BAND) if transposed else height
    rows = spread_out(encoded.shape[0], height, x.device)
    source = _rows(x, rows, transposed).to(torch.float32)
    if operand.hadamard:
        source = Hadamard(operand.hadamard, sign_seed)(padded(source, operand.hadamard).contiguous())
    found = _rows_of(written, rows)
    numbers = found.numbers().to(torch.float32)
    inner = source
    if found.columns is not None and found.values is not None:
        inner = source.scatter_add(1, found.columns.to(torch.int64), -found.values)
    limit = greatest(encoded.format.element) * units(found.encoded)
    if encoded.format.is_asymmetric:
        limit = math.inf  # its range is that of the block
    sums = (
        source.to(torch.float64).square().sum(),  # squares of small gradients are no fp32 numbers
        (source - numbers).to(torch.float64).square().sum(),
        torch.tensor(source.numel(), device=source.device),
        (source != 0).sum(),
        ((source != 0) & (numbers == 0)).sum(),
        # amax and scale, both rounded, may differ by some 2^-23.
        (inner.abs() > limit * (1 + 1e-6)).sum(),
    )
    return torch.stack([each.to(torch.float64) for each in sums])


def _rows(x: Tensor, picked: Tensor, transposed: bool) -> Tensor:
    """Some rows of `x`, or of its transpose."""
    return x.index_select(1, picked).T.contiguous() if transposed else x.index_select(0, picked)


def _rows_of(written: Written, rows: Tensor) -> Written:
    """Some of an operand's rows: whole blocks of them."""
    encoded, block = written.encoded, written.encoded.format.block
    bands = rows[:: block.rows or 1] // (block.rows or 1)
    parts = {
        name: tensor[rows]
        if name in ("codes", "values")
        else tensor[bands]
        if block.rows is not None and name != "global_scale"
        else tensor
        for name, tensor in encoded.tensors.items()
    }
    columns, values = (None if each is None else each[rows] for each in (written.columns, written.values))
    return Written(Encoded(encoded.format, (len(rows), encoded.shape[1]), parts), columns, values)
