"""Claim: stochastic rounding, the Hadamard transform and the differentiable gradient estimator each lower the loss of a
training in 4 bits: NVFP4 and fp4-dge with and without them, everything else the same.

    python benchmarks/what_each_part_of_a_recipe_brings.py [--tokens N] [--runs NAME ...] [--seeds N ...] [--out DIR]

The embedded model's architecture from new weights, on the text that it was made of, in the same order for each seed. A
run of a million tokens takes some 15 minutes of a core. Those that are done are kept in results/ and not run again, the
same command goes on with one that was stopped, and `--runs` without a name only takes in what is done in --out. It also
writes docs/concepts/training-loss.md.
"""

import argparse
from pathlib import Path

from accumulated import page, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--runs", nargs="*", choices=list(page.VARIANTS), default=list(page.VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("build/parts"))
    options = parser.parse_args()
    names = {name: recipe for name, (recipe, _) in page.VARIANTS.items()}
    runs = train(page.PARTS, names, options.tokens, options.runs, options.seeds, options.out)
    page.write()
    print(page.parts_table(runs))


if __name__ == "__main__":
    main()
