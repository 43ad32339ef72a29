"""Claim: a few directions of a large matrix by randomised subspace iteration take a fraction of the time of all
eigenvectors and leave out at most a hundredth more of the outputs' energy.

Matrices with a falling spectrum (the i-th singular value of the plain matrix is i^−0.35) and one without any, which no
iteration finds quickly, under a gram that spans two orders of magnitude. `exact_s` is the time of all eigenvectors,
`randomized_s` that of the directions, of the thread's own CPU time; `excess` is how much more they leave out than the
optimum, and `measured` how far what they say of that is from what it is, both relative.

    python benchmarks/randomized_factors_take_a_fraction_of_the_time.py [--sizes 1024,2048]
"""

import argparse

import torch
from interleaved import interleave, save, spread

from parco.fitting.factor import basis
from parco.fitting.randomized import leading
from parco.fitting.statistics import Statistics

SPECTRA = {"falling": 0.35, "flat": 0.0}
RANKS = (16, 64, 128, 256)


def matrix(size: int, power: float) -> torch.Tensor:
    made = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    if power == 0:
        return made
    left, values, right = torch.linalg.svd(made)
    return left * torch.arange(1, len(values) + 1) ** -power @ right


def statistics(size: int) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(size, size, generator=generator) / size**0.5
    return Statistics.of(torch.randn(2 * size, size, generator=generator) * torch.logspace(1, -1, size) @ mix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,2048")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for size in map(int, options.sizes.split(",")):
        seen = statistics(size)
        for spectrum, power in SPECTRA.items():
            weight = matrix(size, power)
            energies = basis(weight, seen).energies
            runs = {0: lambda weight=weight, seen=seen: basis(weight, seen)} | {
                rank: lambda rank=rank, weight=weight, seen=seen: leading(weight, seen.gram, rank) for rank in RANKS
            }
            seconds = interleave({str(rank): run for rank, run in runs.items()}, options.rounds, warm=1)
            exact = spread(seconds["0"])["median_us"] / 1e6
            for rank in RANKS:
                found = leading(weight, seen.gram, rank)
                wide, basis_ = weight.double(), found.directions.double()
                delta = wide - basis_ @ (basis_.T @ wide)
                error = float(((delta @ seen.gram.double()) * delta).sum())
                mine = spread(seconds[str(rank)])["median_us"] / 1e6
                rows.append(
                    {"size": size, "spectrum": spectrum, "rank": rank, "exact_s": exact, "randomized_s": mine}
                    | {"times_exact": exact / mine, "passes": found.passes, "left_out": error / found.total}
                    | {"excess": error / float(energies[rank:].sum()) - 1, "measured": found.left_out / error - 1}
                )
    save(__file__, rows)


if __name__ == "__main__":
    main()
