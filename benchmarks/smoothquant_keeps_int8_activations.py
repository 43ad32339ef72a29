"""Claim: where some channels are far larger than the others, int8 activations cost a model much, and scales
(SmoothQuant) or a rotation before int8 take most of that back; where there are none, neither is needed.

KL from the original, nats per token, of the shipped model and of the same with outlier channels, its matrices inside
the blocks in int8, or in int4, first with floats and then with int8 activations. All matrices are rounded to nearest on
what the original's inputs were.

    python benchmarks/smoothquant_keeps_int8_activations.py [--work DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import compressed
from interleaved import save

from parco.fitting.methods import parse
from parco.nn import set_product_

METHODS = (
    "int8:row@rtn",
    "scale(rule=smoothquant)>>int8:row@rtn",
    "rotate>>int8:row@rtn",
    "int4:64@rtn",
    "scale(rule=smoothquant)>>int4:64@rtn",
    "rotate>>int4:64@rtn",
)


def stored(judged: compressed.Judged, text: str) -> Any:
    method = parse(text)
    return compressed.at_once(judged, compressed.stored(lambda _: method))


def judge(judged: compressed.Judged, model: Any) -> dict[str, float]:
    floats = judged.divergences(model)
    set_product_(model, "activations(int8)")
    return floats | {f"{name}_int8": kl for name, kl in judged.divergences(model).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/compressed"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = compressed.Rows(options.work / "activations.json")
    for judged in (compressed.shipped(options.work), compressed.with_outliers(options.work)):
        for text in METHODS:
            rows.add(judged, lambda judged=judged, text=text: stored(judged, text), judge, method=text)
    save(__file__, rows.rows)


if __name__ == "__main__":
    main()
