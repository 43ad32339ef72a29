"""Claim: at 20, 40 and 60% of the linear parameters removed, factors found on shifted inputs with ranks allocated over
the whole model keep a language model's perplexity at or below that of plain SVD, FWSVD, ASVD and SVD-LLM, before and
after equal healing.

The papers, LLaMA-7B, perplexity on WikiText-2 (dense 5.68) at 20/40/60% removed: SVD 20061/52489/105474, FWSVD
1727/18156/32194, ASVD 11.14/1407/57057, SVD-LLM 7.94/13.73/66.62. Here small models on their held-out text and on
another. The published methods as published, each at one ratio for all matrices, on the original's inputs; the
embedding and the head are kept. Then what each part of ours brings, left out or added in turn:

    shifted inputs   each block is solved on what the changed blocks before it produce, towards the original's outputs
    allocation       ranks by the knapsack of a fit, on the second-order prediction of the loss
    refit            the left factor fitted again to the right one by least squares, without the target's damping
    joint bases      one right factor for q, k and v, and one for gate and up (`joint(...)`, `weights.Shared`); GPT-2
                     has one matrix for q, k and v and one for what goes up, so there is nothing to join

"healed" is what the same steps of a fit's healing (KL to the original's outputs, on calibration text) make of a row's
model: they train its factors, norms, embedding and head.

    python benchmarks/factors_keep_more_than_published_methods.py [--work DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import compressed
import torch
from compressed import Change, Judged, at_once, in_turn, page
from interleaved import save

from parco.fitting.methods import Factor, Joint, Made, Metric
from parco.fitting.plan import Option
from parco.fitting.statistics import Statistics
from parco.nn.blocks import Group, matrix

PUBLISHED: Mapping[str, Metric] = {"svd": "plain", "fwsvd": "fisher", "asvd": "scaled", "svd-llm": "activation"}
REMOVED = (0.2, 0.4, 0.6)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of a matrix's parameters among which allocation chooses; the matrix itself is another choice."""


def rank_of(shape: tuple[int, ...], share: float) -> int:
    """The largest rank whose factors have no more than `share` of the parameters."""
    return max(1, int(share * shape[0] * shape[1] / (shape[0] + shape[1])))


def factored(shares: Mapping[str, float], metric: Metric = "activation", refit: bool = False) -> Change:
    """Every matrix by factors of the group's share of its parameters; as it is where that is 1."""

    def change(model: Any, group: Group, seen: dict[str, Statistics]) -> dict[str, Made]:
        made: dict[str, Made] = {}
        for member in group.members:
            weight, share = matrix(model, member).float().contiguous(), shares[group.name]
            if share < 1.0:
                method = Factor(rank=rank_of(weight.shape, share), metric=metric, format="fp32")
                spec, (left, right) = method(weight, seen[member])
                made[member] = spec, (refitted(weight, right, seen[member]) if refit else left, right)
        return made

    return change


def refitted(weight: torch.Tensor, right: torch.Tensor, seen: Statistics) -> torch.Tensor:
    """The left factor that is best for ‖W X_original − L R X_seen‖² given the right one."""
    assert seen.cross is not None
    narrow = right.double()
    moment = narrow @ seen.gram.double() @ narrow.T
    moment.diagonal().add_(1e-7 * moment.diagonal().mean())
    wanted = weight.double() @ seen.cross.double() @ narrow.T
    return torch.cholesky_solve(wanted.T, torch.linalg.cholesky(moment)).T.float()


def joint(shares: Mapping[str, float]) -> Change:
    """The matrices of a group by factors whose right one is one for all."""

    def change(model: Any, group: Group, seen: dict[str, Statistics]) -> dict[str, Made]:
        parts = [matrix(model, member).float().contiguous() for member in group.members]
        share = shares[group.name]
        if share == 1.0:
            return {}
        rank = rank_of((sum(len(part) for part in parts), parts[0].shape[1]), share)
        members = [(part, seen[member]) for part, member in zip(parts, group.members, strict=True)]
        made = Joint(Factor(rank=rank, format="fp32")).each(members)
        return dict(zip(group.members, made, strict=True))

    return change


@torch.no_grad()
def options_of(judged: Judged, together: bool) -> dict[str, list[Option]]:
    """Parameters and predicted loss of every share for every group; members with a basis of their own or one
    `together`.
    """
    model, table = judged.load(), {}
    for group in judged.linear_groups:
        seen = judged.statistics(group)
        shapes = [tuple(matrix(model, member).shape) for member in group.members]
        whole = sum(rows * columns for rows, columns in shapes)
        table[group.name] = [Option("1", whole, 0.0, 0.0, 0.0)]
        for share in SHARES:
            shared = {group.name: share}
            made = (joint(shared) if together else factored(shared))(model, group, seen)
            loss = 0.0
            for member, (spec, tensors) in made.items():
                error = _error(matrix(model, member).float() - spec.dense(*tensors), seen[member])
                loss += 0.5 * float((error * seen[member].row_energy).sum())
            stacked = [(sum(rows for rows, _ in shapes), shapes[0][1])] if together else shapes
            size = sum(rank_of(shape, share) * sum(shape) for shape in stacked)
            table[group.name].append(Option(f"{share:g}", size, loss, 0.0, 0.0))
    return table


def _error(delta: torch.Tensor, seen: Statistics) -> torch.Tensor:
    return ((delta @ seen.gram) * delta).sum(1) / seen.count


def allocated(table: Mapping[str, list[Option]], removed: float) -> dict[str, float]:
    """The share of every group that the knapsack gives it within the parameters that are to stay."""
    whole = sum(options[0].bytes for options in table.values())
    return {group: float(share) for group, share in compressed.allocated(table, (1 - removed) * whole).items()}


def run(judged: Judged, rows: compressed.Rows) -> None:
    rows.add(judged, judged.load, removed=0.0, method="dense")
    tables = cache(lambda together: options_of(judged, together))
    joins = any(len(group.members) > 1 for group in judged.linear_groups)
    for removed in REMOVED:
        same = {group.name: 1 - removed for group in judged.linear_groups}

        def add(name: str, make: Any, removed: float = removed) -> None:
            rows.add(judged, make, removed=removed, method=name)

        def own(together: bool = False, removed: float = removed) -> dict[str, float]:
            return allocated(tables(together), removed)

        whole = {
            **{name: lambda m=metric, s=same: at_once(judged, factored(s, m)) for name, metric in PUBLISHED.items()},
            "ours": lambda own=own: in_turn(judged, factored(own())),
        }
        if joins:
            whole["ours with joint bases"] = lambda own=own: in_turn(judged, joint(own(True)))
        for name, make in whole.items():
            add(name, make)
            add(f"{name}, healed", lambda make=make: judged.healed(make()))
        add("ours without shifted inputs", lambda: at_once(judged, factored(own())))
        add("ours without allocation", lambda s=same: in_turn(judged, factored(s)))
        add("ours with refit", lambda: in_turn(judged, factored(own(), refit=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/compressed"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = compressed.Rows(options.work / "factors.json")
    for judged in compressed.models(options.work):
        run(judged, rows)
    save(__file__, rows.rows)
    page.write(compressed.HEAL)


if __name__ == "__main__":
    main()
