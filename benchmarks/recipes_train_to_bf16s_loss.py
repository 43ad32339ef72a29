"""Claim: few bits in all three products of a training step cost little loss: the embedded model's architecture, from
new weights, on the text that it was made of, by every recipe, on the same data in the same order for each seed.

    python benchmarks/recipes_train_to_bf16s_loss.py [--tokens N] [--recipes NAME ...] [--seeds N ...] [--out DIR]

A run takes more than an hour of a core. Those that are done are kept in results/ and not run again; runs lie in --out,
where the same command goes on with one that was stopped, and whence it takes in what another process finished there
(`--recipes` without a name only does that). It also writes docs/concepts/training-loss.md: the relative rise of the
held-out loss over bf16's, the mean over seeds that both have with its standard error, and along the training.
"""

import argparse
from pathlib import Path

from accumulated import page, train

from parco.training import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("build/recipes"))
    options = parser.parse_args()
    names = {name: name for name in RECIPES}
    runs = train(page.LOSSES, names, options.tokens, options.recipes, options.seeds, options.out)
    page.write()
    print(page.losses_table(runs))


if __name__ == "__main__":
    main()
