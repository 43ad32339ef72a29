"""A plan: one choice per group of layers, with what it is predicted and what it was measured to cost.

Immutable, readable, replayable: `Plan.from_json(json.loads(text))` gives back an equal plan, and `plan.name` (a hash of
the choices alone) is the same wherever the same choices are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from parco.fitting.stages import digest


@dataclass(frozen=True)
class Option:
    """One method for one group: its bytes, its predicted loss (nats per token) and its seconds."""

    method: str
    bytes: int
    loss: float
    decode: float
    prefill: float


@dataclass(frozen=True)
class Measured:
    """A plan applied to the whole model: KL to the original on the check windows (nats per token), before and after
    healing.
    """

    loss: float
    healed: float | None = None
    decode: float | None = None
    prefill: float | None = None


@dataclass(frozen=True)
class Plan:
    """`choices` is sorted by the model's order of groups. `fixed` bytes and seconds are what no choice changes."""

    choices: tuple[tuple[str, str], ...]
    bytes: int
    loss: float
    decode: float
    prefill: float
    measured: Measured | None = None

    @property
    def name(self) -> str:
        """Twelve hex digits that depend on the choices alone."""
        return digest([list(choice) for choice in self.choices])[:12]

    @property
    def methods(self) -> dict[str, str]:
        return dict(self.choices)

    @property
    def summary(self) -> str:
        """Such as "int5:64 x 12, int4:64 x 8": the methods, the most frequent first."""
        counts = Counter(method for _, method in self.choices)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{method} x {count}" for method, count in ordered)

    def with_measured(self, measured: Measured) -> Plan:
        return replace(self, measured=measured)

    def to_json(self) -> dict[str, Any]:
        measured = None if self.measured is None else dict(sorted(vars(self.measured).items()))
        return {
            "name": self.name,
            "choices": [list(choice) for choice in self.choices],
            "bytes": self.bytes,
            "loss": self.loss,
            "decode": self.decode,
            "prefill": self.prefill,
            "measured": measured,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Plan:
        """Raises ValueError when a key is missing."""
        missing = {"choices", "bytes", "loss", "decode", "prefill"} - set(value)
        if missing:
            raise ValueError(f"a plan needs the keys {', '.join(sorted(missing))}")
        measured = value.get("measured")
        return Plan(
            tuple((str(group), str(method)) for group, method in value["choices"]),
            int(value["bytes"]),
            float(value["loss"]),
            float(value["decode"]),
            float(value["prefill"]),
            None if measured is None else Measured(**measured),
        )


@dataclass(frozen=True)
class Fixed:
    """What the plan does not change: bytes of norms and biases, seconds of everything that is not a product."""

    bytes: int
    decode: float
    prefill: float


def assemble(choices: Iterable[tuple[str, Option]], fixed: Fixed) -> Plan:
    """The plan of these choices, its costs summed."""
    chosen = list(choices)
    return Plan(
        tuple((group, option.method) for group, option in chosen),
        fixed.bytes + sum(option.bytes for _, option in chosen),
        sum(option.loss for _, option in chosen),
        fixed.decode + sum(option.decode for _, option in chosen),
        fixed.prefill + sum(option.prefill for _, option in chosen),
    )
