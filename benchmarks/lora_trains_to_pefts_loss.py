"""Claim: LoRA trained by parco ends at the loss that PEFT's ends at from the same start on the same data, within the
noise of the seed.

    python benchmarks/lora_trains_to_pefts_loss.py [--steps N] [--seeds N] [--layers N] [--threads N] [--window N]

Rank 16 on all linear layers of the blocks of a Llama of 100 million parameters with new weights in bf16, AdamW. Model,
factors and data are those of the seed, the same for both; the noise is the standard deviation of PEFT's loss over
seeds. The loss of a run is the mean over its last five steps.
"""

import argparse
import dataclasses
import statistics

from beside_peft import SMALL, Contender, race
from interleaved import save

LAST = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SMALL.layers)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    shape = dataclasses.replace(SMALL, layers=options.layers)
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        ours = Contender("parco", shape, 1, options.window, seed=seed, threads=options.threads)
        ran = race([ours, dataclasses.replace(ours, library="peft")], options.steps, warm=0)
        mine, theirs = (statistics.mean(each.losses[-LAST:]) for each in ran)
        first = {"first_parco": ran[0].losses[0], "first_peft": ran[1].losses[0]}
        rows.append(
            {"seed": seed, "steps": options.steps, **first, "parco": mine, "peft": theirs, "gap": mine - theirs}
        )
        print(rows[-1], flush=True)
    if options.seeds > 1:
        gaps, finals = ([float(str(row[key])) for row in rows] for key in ("gap", "peft"))
        whole = {"mean_gap": statistics.mean(gaps), "standard_error": statistics.stdev(gaps) / len(gaps) ** 0.5}
        rows.append({"seed": "all", "steps": options.steps, **whole, "noise": statistics.stdev(finals)})
    save(__file__, rows)


if __name__ == "__main__":
    main()
