"""Claim: under scales that are searched, and more so by GPTQ, a model in a format of floats or of a table keeps more of
itself than cast by the format's own rule.

    cast    by the format's own rule, as `parco.encode` does
    rtn     to nearest under searched scales, columns weighed by their inputs
    gptq    with compensation by later columns, under searched scales, towards the original's outputs

Block by block on what the changed blocks before it produce. KL from
the original, nats per token, of the shipped model on its held-out text and on another; then after a fit's healing. The
embedding and the head are kept.

    python benchmarks/searched_scales_keep_more_of_every_format.py [--work DIR] [--formats NAME ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import compressed
from interleaved import save

from parco.fitting.methods import parse

FORMATS = ("nvfp4", "mxfp4", "nf4:64", "ternary:row")


def changed(judged: compressed.Judged, form: str, how: str) -> Any:
    """The model with every matrix inside the blocks in the format `form`."""
    method = parse(form if how == "cast" else f"{form}@{how}")
    return compressed.in_turn(judged, compressed.stored(lambda _: method, seeing=how != "cast"))


def judge(judged: compressed.Judged, model: Any) -> dict[str, float]:
    before = judged.divergences(model)
    after = judged.divergences(judged.healed(model))
    return before | {f"{name}_healed": kl for name, kl in after.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/compressed"))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows, judged = compressed.Rows(options.work / "formats.json"), compressed.shipped(options.work)
    for form in options.formats:
        for how in ("cast", "rtn", "gptq"):
            rows.add(judged, lambda form=form, how=how: changed(judged, form, how), judge, format=form, how=how)
    save(__file__, rows.rows)


if __name__ == "__main__":
    main()
