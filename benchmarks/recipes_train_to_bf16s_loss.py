"""Claim: few bits in all three products of a training step cost little loss: the embedded model's architecture, from
new weights, on the text that it was made of, by every recipe, on the same data in the same order for each seed.

    python benchmarks/recipes_train_to_bf16s_loss.py [--tokens N] [--recipes NAME ...] [--seeds N] [--out DIR]

Runs lie in --out; the same command goes on where it was stopped, and takes hours for all of them. The result is the
relative rise of the held-out loss over bf16's, the mean over seeds that both have with its standard error, and the
curves.
"""

import argparse
import json
import sysconfig
from pathlib import Path

from interleaved import save

from parco import hub
from parco.cli import terminal
from parco.report import curves
from parco.trainer import Settings, gaps, run
from parco.training import RECIPES

WINDOW, BATCH = 512, 16


def texts(folder: Path) -> tuple[Path, Path]:
    """The standard library's sources without those that are held out, as a folder, and the held-out text."""
    train = folder / "text"
    embedded = hub.embedded_path()
    if not train.exists():
        held = set(json.loads((embedded / "training.json").read_text())["held_out"])
        library = Path(sysconfig.get_paths()["stdlib"])
        partial = folder / "text.partial"
        for line in (embedded / "sources.tsv").read_text().splitlines():
            name = line.rpartition("\t")[2]
            source = library / name
            if not line.startswith("#") and name not in held and source.is_file():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(source.read_bytes())
        partial.rename(train)
    return train, embedded / "heldout.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="of those that are to run now")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("build/recipes"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data, held = texts(options.out)
    steps = -(-options.tokens // (WINDOW * BATCH))
    for seed in options.seeds:
        for recipe in options.recipes:
            settings = Settings(
                model=None, data=(str(data),), held=str(held), steps=steps, recipe=recipe, batch=BATCH, seq=WINDOW,
                lr=2e-3, seed=seed, eval_every=max(1, steps // 20), save_every=max(1, steps // 50),
            )  # fmt: skip
            folder = options.out / f"{recipe.replace(':', '-')}-{steps}-seed{seed}"
            with terminal.progress() as progress:
                run(settings, folder, progress, resume=folder.exists())
    done = [json.loads(file.read_text()) for file in sorted(options.out.glob(f"*-{steps}-seed*/result.json"))]
    order = list(RECIPES)
    done.sort(key=lambda one: (order.index(one["recipe"]), one["settings"]["seed"]))
    found = gaps(done)
    terminal.console().print(curves.gap_table(found))
    curves.write(done, found, options.out / "report.html")
    rows = [dict(gap) | {"tokens": done[0]["tokens"], "held_out_windows": done[0]["held_out_windows"]} for gap in found]
    save(__file__, rows)


if __name__ == "__main__":
    main()
