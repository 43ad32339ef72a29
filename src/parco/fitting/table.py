"""The solver's table: bytes and loss of every candidate as judged, seconds of its kernels as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parco.fitting.candidates import Judged
from parco.fitting.measure import Timings, kernel_key, measure_kernels, native
from parco.fitting.methods import Method
from parco.fitting.observe import expert_of, is_lookup
from parco.fitting.plan import Fixed, Option
from parco.fitting.size import method_for, owners
from parco.fitting.stages import Progress
from parco.nn.blocks import Group, groups, matrix
from parco.weights import Weight

SLOWER = 1.02
"""Times apart by less are not told apart."""


@dataclass(frozen=True)
class Products:
    """The products of one group: (shape, how often a token runs it). Lookups are none; an expert runs for its share of
    tokens.
    """

    shapes: tuple[tuple[tuple[int, int], float], ...]
    last_only: bool  # a head: prefill needs the last position alone
    group: Group

    def weights(self, text: str) -> list[tuple[Weight, float]]:
        """What the products multiply by under a method, and how often; a factor that members share is one."""
        method = method_for(self.group, text)
        if method.together:
            return [(weight, 1.0) for weight in method.products([shape for shape, _ in self.shapes])]
        return [(method.spec(shape), share) for shape, share in self.shapes]


def products(model: nn.Module, group: Group) -> Products:
    found: list[tuple[tuple[int, int], float]] = []
    for member in group.members:
        if expert_of(member) is None and is_lookup(model, member):
            continue
        rows, columns = matrix(model, member).shape
        found.append(((rows, columns), expert_share(model, group) if expert_of(member) else 1.0))
    return Products(tuple(found), group.kind in ("head", "embed"), group)


def expert_share(model: Any, group: Group) -> float:
    """Share of a block's experts that one token runs through."""
    config = model.config.get_text_config()
    active = int(getattr(config, "num_experts_per_tok", 1))
    return min(1.0, active / max(1, len(group.members)))


def measure(
    model: nn.Module,
    judged: Mapping[str, Sequence[Judged]],
    prefill: int,
    footprint: int,
    dtype: torch.dtype,
    timings: Timings,
    progress: Progress,
) -> None:
    """Time every kernel that some candidate of some group needs."""
    wanted: dict[tuple[int, int], dict[str, Weight]] = {}
    for group in groups(model):
        work = products(model, group)
        for shape, _ in work.shapes:
            wanted.setdefault(shape, {})
        for row in judged[group.name]:
            for spec, _ in work.weights(row.method) if row.method != "keep" else ():
                wanted.setdefault(spec.shape, {})[str(spec)] = spec
    measure_kernels(
        {shape: list(kinds.values()) for shape, kinds in wanted.items()},
        (1, prefill),
        dtype,
        footprint,
        timings,
        progress,
    )


def seconds(
    model: nn.Module, group: Group, method: str, prefill: int, footprint: int, dtype: torch.dtype, timings: Timings
) -> tuple[float, float]:
    """(decode, prefill) seconds of a group's products by one method, as measured."""
    work = products(model, group)
    decode = whole = 0.0
    kinds = (
        [(native(shape), share) for shape, share in work.shapes]
        if method == "keep"
        else [(str(spec), share) for spec, share in work.weights(method)]
    )
    for kind, share in kinds:
        one = timings[kernel_key(kind, 1, dtype, footprint)]
        decode += share * one
        whole += one if work.last_only else share * timings[kernel_key(kind, prefill, dtype, footprint)]
    return decode, whole


def build(
    model: nn.Module,
    judged: Mapping[str, Sequence[Judged]],
    original: tuple[float, float],
    stored: int,
    prefill: int,
    footprint: int,
    dtype: torch.dtype,
    timings: Timings,
) -> tuple[dict[str, list[Option]], Fixed]:
    """Options of every group, and what no choice changes.

    original: measured (decode, prefill) seconds of the original; stored: its bytes. The remainder is what is left of
    them when the kept matrices' own kernels are taken away, never below zero.
    """
    table: dict[str, list[Option]] = {}
    kept_bytes, kept_decode, kept_prefill = 0, 0.0, 0.0
    for group in groups(model):
        options: list[Option] = []
        for row in judged[group.name]:
            decode, whole = seconds(model, group, row.method, prefill, footprint, dtype, timings)
            options.append(Option(row.method, row.bytes, row.loss, decode, whole))
        keep = next(option for option in options if option.method == "keep")
        kept_bytes, kept_decode, kept_prefill = (
            kept_bytes + keep.bytes,
            kept_decode + keep.decode,
            kept_prefill + keep.prefill,
        )
        table[group.name] = options
    fixed = Fixed(stored - kept_bytes, max(0.0, original[0] - kept_decode), max(0.0, original[1] - kept_prefill))
    return table, fixed


def offered(table: Mapping[str, Sequence[Option]]) -> dict[str, list[Option]]:
    """The options that may be chosen: none with zeros or of a lower rank that decodes slower than the dense matrix."""
    found: dict[str, list[Option]] = {}
    for group, options in table.items():
        dense = next(option for option in options if option.method == "keep").decode * SLOWER
        found[group] = [one for one in options if one.decode <= dense or not Method.parse(one.method).leaves_out]
    return found


def reason(option: Option, chosen: Option) -> str:
    """Why `option` was passed over for `chosen`, from the numbers alone."""
    parts: list[str] = []
    if option.loss > chosen.loss:
        parts.append(f"costs {option.loss - chosen.loss:.2g} nats more")
    if option.bytes > chosen.bytes * 1.001:
        parts.append(f"takes {(option.bytes - chosen.bytes) / 1e6:.2g} MB more")
    if option.decode > chosen.decode * SLOWER:
        parts.append(f"decodes {(option.decode - chosen.decode) * 1e6:.0f} µs slower")
    if option.prefill > chosen.prefill * SLOWER:
        parts.append(f"prefills {(option.prefill - chosen.prefill) * 1e3:.2f} ms slower")
    if parts:
        return ", ".join(parts)
    return "better here, but what it saves is worth more in another group"


def owners_shapes(model: nn.Module, group: Group) -> list[list[int]]:
    return [list(matrix(model, member).shape) for member in owners(model, group)]
