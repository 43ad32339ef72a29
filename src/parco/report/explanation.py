"""Why every layer is as it is: the fit's own record of each group, and the kernels that run it on this machine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from parco.kernels.table import NATIVE, Explanation, explain
from parco.nn.blocks import Group, groups, site

if TYPE_CHECKING:
    from parco.fitting.result import GroupRow


@dataclass(frozen=True)
class Member:
    """One matrix: its name, how it is stored (a Weight's text), and the kernels for one token and for a prompt."""

    name: str
    stored: str
    decode: tuple[Explanation, ...]
    prefill: tuple[Explanation, ...]

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels of one token, or what runs instead."""
        return tuple(found.kernel for found in self.decode) or (NATIVE,)


@dataclass(frozen=True)
class Explained:
    """One group of layers. `fitted` is what the fit recorded, None where the folder has no such record."""

    group: str
    members: tuple[Member, ...]
    fitted: GroupRow | None

    @property
    def choice(self) -> str:
        """The method's text, or how the matrices are stored where no fit recorded a method."""
        stored = ", ".join(dict.fromkeys(member.stored for member in self.members))
        return stored if self.fitted is None else self.fitted["method"]

    @property
    def kernels(self) -> str:
        """The kernels of one token, each once."""
        return ", ".join(dict.fromkeys(name for member in self.members for name in member.kernels))

    def to_json(self) -> dict[str, Any]:
        """Plain values: what `parco explain --json` prints."""
        members = [
            {
                "name": member.name,
                "stored": member.stored,
                "decode": [_plain(found) for found in member.decode],
                "prefill": [_plain(found) for found in member.prefill],
            }
            for member in self.members
        ]
        return {"group": self.group, "choice": self.choice, "members": members, "fitted": self.fitted}


def explain_groups(
    model: nn.Module, rows: Iterable[GroupRow], prefill_tokens: int, only: str | None = None
) -> list[Explained]:
    """Every group of `model`, or the one that is called `only` or has a layer of that name.

    rows: the fit's record, from `result.json`; empty for a model that was not fitted. Raises ValueError for an unknown
    `only`, naming the closest.
    """
    found = groups(model)
    if only is not None:
        found = [group for group in found if only in (group.name, *group.members)] or _unknown(only, found)
    recorded = {row["group"]: row for row in rows}
    return [
        Explained(
            group.name,
            tuple(_member(model, name, prefill_tokens) for name in group.members),
            recorded.get(group.name),
        )
        for group in found
    ]


def _member(model: nn.Module, name: str, prefill_tokens: int) -> Member:
    where = site(model, name)
    if where.kind == "expert":
        parameter, index = where.expert
        held: Any = getattr(where.module, parameter)[index]
    else:
        held = where.module.weight
    rows, columns = where.shape
    spec = getattr(held, "spec", None)
    stored = f"{str(held.dtype).removeprefix('torch.')} {rows}x{columns}" if spec is None else str(spec)
    if spec is None:
        return Member(name, stored, (), ())
    runs = where.module if where.kind == "embedding" else spec
    found = [explain(runs, rows=tokens, dtype=held.dtype) for tokens in (1, prefill_tokens)]
    return Member(name, stored, found[0], found[1])


def _unknown(name: str, known: Sequence[Group]) -> list[Group]:
    names = list(dict.fromkeys(text for group in known for text in (group.name, *group.members)))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    raise ValueError(f"--layer {name!r} is no layer of this model; close to it are {', '.join(close)}")


def _plain(found: Explanation) -> dict[str, Any]:
    passed = [{"kernel": kernel, "reason": reason} for kernel, reason in found.passed_over]
    return {"operation": found.operation, "call": str(found.call), "kernel": found.kernel, "passed_over": passed}
