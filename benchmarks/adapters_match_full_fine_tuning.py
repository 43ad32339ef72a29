"""Claim: adapters of at most 5% of a model's parameters reach, in equal time, a held-out loss at most 1% above full
fine-tuning's: the model of Python code that ships with parco, tuned to a corner of the standard library that it never
saw, or to C.

    python benchmarks/adapters_match_full_fine_tuning.py [--text corner|c] [--steps N] [--out DIR]
        [--methods METHOD:RATE ...]

The corner is the held-out text that ships with parco, every tenth part of 200 lines held out; C is the headers of the
Python that runs this, every eighth held out. Full fine-tuning takes --steps steps; how many a method may take in the
same time is measured first, with steps of all methods in turn. Runs lie in --out; the same command goes on where it was
stopped. For a fair comparison several rates are tried for each method: the result names the best of each. On C the
claim does not hold (docs/LOG.md); the corner has not been measured yet.
"""

import argparse
import json
import statistics
import sysconfig
from pathlib import Path
from typing import Any

import torch
from interleaved import interleave, save

from parco import adapters, hub
from parco.cli import terminal
from parco.trainer import TuneSettings, tune
from parco.trainer.run import fuse
from parco.training import AdamW, prepare_

WINDOW, BATCH, FULL = 512, 8, "full"
METHODS = ["full:3e-4", "full:1e-3", "lora(16):3e-3", "lora(16):1e-2"]


def texts(kind: str, folder: Path) -> tuple[Path, Path]:
    """The folder of what is trained on, and that of what is held out."""
    places = folder / "train", folder / "held"
    if not all(place.exists() for place in places):
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        if kind == "c":
            headers = sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h"))
            parts, every = [header.read_text(encoding="utf-8", errors="replace") for header in headers], 8
        else:
            lines = hub.embedded_texts().heldout.splitlines(keepends=True)
            parts, every = ["".join(lines[at : at + 200]) for at in range(0, len(lines), 200)], 10
        for index, part in enumerate(parts):
            (places[index % every == 3] / f"{index:04}.txt").write_text(part)
    return places


def stepper(method: str) -> Any:
    """A function that takes one step as `parco tune` does, on random tokens."""
    model: Any = hub.load(hub.embedded_path(), dtype=torch.float32 if method == FULL else None, low_memory=False).model
    if method == FULL:
        prepare_(model, "bf16")
    fuse(model)
    if method != FULL:
        adapters.add_(model, method)
    model.train()
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-5)
    tokens = torch.randint(8192, (BATCH, WINDOW), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def times_faster(methods: list[str], file: Path) -> dict[str, float]:
    """How many steps of each method full fine-tuning's time is enough for, relative to its own; measured once."""
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    if any(method not in known for method in methods):
        seconds = interleave({method: stepper(method) for method in dict.fromkeys([FULL, *methods])}, rounds=4)
        beside = seconds[FULL]
        known |= {m: statistics.median(a / b for a, b in zip(beside, own, strict=True)) for m, own in seconds.items()}
        file.write_text(json.dumps(known))
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=["corner", "c"], default="corner")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("build/adapters"))
    options = parser.parse_args()
    work = options.out / options.text
    train, held = texts(options.text, work)
    given = [tuple(each.rsplit(":", 1)) for each in options.methods]
    faster = times_faster([method for method, _ in given], work / "times_faster.json")
    best: dict[str, Any] = {}
    for method, rate in given:
        steps = round(options.steps * faster[method])
        settings = TuneSettings(
            str(hub.embedded_path()), (str(train),), method, held=str(held), lr=float(rate), steps=steps, batch=BATCH,
            seq=WINDOW, eval_every=max(1, steps // 2), save_every=max(1, steps // 4),
        )  # fmt: skip
        folder = work / f"{method}-{rate}-{steps}"
        with terminal.progress() as progress:
            done = tune(settings, folder, progress, resume=(folder / "settings.json").exists())
        print(f"{method} {rate}: {done['before']:.4f} -> {done['loss']:.4f} at step {done['best_step']}", flush=True)
        if method not in best or done["loss"] < best[method]["loss"]:
            best[method] = done
    rows: list[dict[str, object]] = [
        {
            "text": options.text,
            "method": method,
            "rate": done["settings"]["lr"],
            "trained": done["trained"] / done["parameters"],
            "steps": done["settings"]["steps"],
            "steps_in_equal_time": faster[method],
            "before": done["before"],
            "loss": done["loss"],
            "beside_full": done["loss"] / best[FULL]["loss"] - 1,
            "held_out_windows": done["held_out_windows"],
        }
        for method, done in best.items()
    ]
    save(__file__, rows)


if __name__ == "__main__":
    main()
