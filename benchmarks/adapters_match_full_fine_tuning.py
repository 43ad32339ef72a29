"""Claim: adapters of at most 5% of a model's parameters reach, in equal time, a held-out loss at most 1% above full
fine-tuning's: the model of Python code that ships with parco, tuned to a corner of the standard library that it never
saw, or to C.

    python benchmarks/adapters_match_full_fine_tuning.py [--text corner c] [--steps N] [--seeds N] [--out DIR]
        [--methods METHOD:RATE ...]

The corner is the held-out text that ships with parco, every tenth part of 200 lines held out; C is the headers of the
Python that runs this, every eighth held out. Full fine-tuning takes --steps steps; how many a method may take in the
same time is measured first, with steps of all methods in turn. `lora(12)+head` has an adapter on the output head too.
Runs lie in --out; the same command goes on where it was stopped. Where several rates are given for a method, the result
names the best of them by the mean over seeds.
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

WINDOW, BATCH, FULL, HEAD = 256, 2, "full", "+head"
METHODS = ["full:1e-3", "lora(16):1e-2", "lora(12)+head:1e-2"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def targets_of(method: str) -> tuple[str, ...] | None:
    """The layers that `parco tune` is told to adapt."""
    return (*LINEAR, "lm_head") if method.endswith(HEAD) else None


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
    if method != FULL:
        adapters.add_(model, method.removesuffix(HEAD), targets_of(method))
    fuse(model)
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
    parser.add_argument("--text", nargs="+", choices=["corner", "c"], default=["corner", "c"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("build/adapters"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for text in options.text:
        rows += compare(text, [tuple(each.rsplit(":", 1)) for each in options.methods], options)
    save(__file__, rows)


def compare(text: str, given: list[tuple[str, str]], options: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one text; `given` are methods and rates."""
    work = options.out / text
    train, held = texts(text, work)
    faster = times_faster([method for method, _ in given], work / "times_faster.json")
    found: dict[tuple[str, str], list[Any]] = {}
    for seed in range(options.seeds):
        for method, rate in given:
            steps = round(options.steps * faster[method])
            settings = TuneSettings(
                str(hub.embedded_path()), (str(train),), method.removesuffix(HEAD), targets_of(method), held=str(held),
                lr=float(rate), steps=steps, batch=BATCH, seq=WINDOW, eval_every=steps, save_every=steps, seed=seed,
            )  # fmt: skip
            folder = work / f"{method}-{rate}-{steps}-seed{seed}"
            with terminal.progress() as progress:
                done = tune(settings, folder, progress, resume=(folder / "settings.json").exists())
            print(f"{text} {method} {rate} seed {seed}: {done['before']:.4f} -> {done['loss']:.4f}", flush=True)
            found.setdefault((method, rate), []).append(done)
    return rows_of(text, found, faster)


def rows_of(text: str, found: dict[tuple[str, str], list[Any]], faster: dict[str, float]) -> list[dict[str, object]]:
    """A row for each method at the best of its rates."""
    means = {key: statistics.mean(done["loss"] for done in runs) for key, runs in found.items()}
    best = {method: min((mean, key) for key, mean in means.items() if key[0] == method)[1] for method, _ in found}
    full = [done["loss"] for done in found[best[FULL]]]
    rows: list[dict[str, object]] = []
    for method, key in best.items():
        losses = [done["loss"] for done in found[key]]
        beside = [own / other - 1 for own, other in zip(losses, full, strict=True)]
        first = found[key][0]
        rows.append(
            {
                "text": text,
                "method": method,
                "rate": key[1],
                "trained": first["trained"] / first["parameters"],
                "steps": first["settings"]["steps"],
                "steps_in_equal_time": faster[method],
                "seeds": len(losses),
                "before": first["before"],
                "loss": means[key],
                "beside_full": statistics.mean(beside),
                "least_beside_full": min(beside),
                "most_beside_full": max(beside),
                "held_out_windows": first["held_out_windows"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
