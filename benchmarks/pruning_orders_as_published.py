"""Claim: at 50% zeros and at 2:4, SparseGPT keeps far more of a language model than magnitudes do, and more than Wanda.

The papers, LLaMA-2-7B, perplexity on WikiText-2 (dense 5.12): 50% 6.51 SparseGPT, 6.42 Wanda; 2:4 10.17, 11.02; both
far below magnitude. Here two small models on their held-out text and on another. In models as small as these no input
is far greater than the others, which is what Wanda lives on: it errs less than magnitudes on every layer by itself, and
on the whole model it need not. So there is a third: the first, computing the same, with uneven channels. Layers are
pruned block by block on what the pruned blocks before them produce, each towards its own outputs, as published; "aimed"
is SparseGPT towards the outputs of the original model, as `parco fit` does it. No healing; the embedding and the head
are kept.

    python benchmarks/pruning_orders_as_published.py [--work DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import compressed
from compressed import page
from interleaved import save

from parco.fitting.methods import Made, Prune
from parco.fitting.methods.prune import Score
from parco.fitting.statistics import Statistics
from parco.nn.blocks import Group, matrix

SCORES: tuple[tuple[str, Score], ...] = (
    ("magnitude", "magnitude"),
    ("wanda", "wanda"),
    ("sparsegpt", "sparsegpt"),
    ("sparsegpt, aimed", "sparsegpt"),
)


def pruned(pattern: str, score: Score, aimed: bool) -> compressed.Change:
    method = Prune(pattern, score)

    def change(model: Any, group: Group, seen: dict[str, Statistics]) -> dict[str, Made]:
        return {
            member: compressed.dense(
                method.solve(
                    matrix(model, member).float().contiguous(), seen[member] if aimed else seen[member].without_cross
                ).values
            )
            for member in group.members
        }

    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/compressed"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = compressed.Rows(options.work / "pruning.json")
    uneven = compressed.with_uneven_channels(options.work)
    for judged in (*compressed.models(options.work), uneven):
        rows.add(judged, judged.load, zeros="none", score="dense")
        for pattern in ("50%", "2:4"):
            for name, score in SCORES:
                change = pruned(pattern, score, "aimed" in name)
                rows.add(judged, lambda c=change, j=judged: compressed.in_turn(j, c), zeros=pattern, score=name)
    save(__file__, rows.rows)
    page.write(compressed.HEAL)


if __name__ == "__main__":
    main()
