"""`parco train` on several ranks: they train as one, and each number of ranks reads the other's checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import RANKS, on_two_ranks

from parco.cli import main

STEPS = 50
CASES = [("DDP", "fp8-delayed"), ("FSDP2", "fp16")]


def train(out: Path, *words: object) -> None:
    given = [
        "train",
        "--steps",
        STEPS,
        "--batch",
        4,
        "--seq",
        32,
        "--lr",
        "3e-4",
        "--save-every",
        25,
        "--out",
        out,
        *words,
    ]
    assert main(list(map(str, given))) == 0


def options(way: str, recipe: str) -> list[str]:
    return ["--recipe", recipe, *(["--shard"] if way == "FSDP2" else [])]


def on_a_rank(rank: int, folder: str, *words: str) -> None:
    """As torchrun starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    train(Path(folder), *words)


def handed_on(source: Path, target: Path) -> None:
    """A run's folder as it was at half of its steps."""
    shutil.copytree(source / "checkpoint-25", target / "checkpoint-25")
    shutil.copy(source / "settings.json", target)


def trained(folder: Path, text: Path, root: Path) -> None:
    """Runs below `root`: of one rank (`alone`), of two (`both`), and each gone on with by the other from its middle."""
    given = ["--model", str(folder), "--data", str(text)]
    cases: list[tuple[Any, ...]] = []
    for way, recipe in CASES:
        words = [*given, *options(way, recipe)]
        train(root / way / "alone", *words)
        handed_on(root / way / "alone", root / way / "on-two")
        cases += [(str(root / way / "both"), *words), (str(root / way / "on-two"), *words, "--resume")]
    on_two_ranks(on_a_rank, cases, root)
    for way, recipe in CASES:
        handed_on(root / way / "both", root / way / "on-one")
        train(root / way / "on-one", *given, *options(way, recipe), "--resume")


def test_two_ranks_train_as_one(folder: Path, text: Path, tmp_path: Path) -> None:
    trained(folder, text, tmp_path)
    for way, recipe in CASES:
        check(tmp_path / way, way, recipe)


def check(out: Path, way: str, recipe: str) -> None:
    runs = {
        name: json.loads((out / name / "result.json").read_text()) for name in ("alone", "both", "on-one", "on-two")
    }
    alone, both = runs["alone"], runs["both"]
    assert f"2 ranks, {way}" in both["runs_on"] and "one process" in alone["runs_on"]
    steps, losses = zip(*both["train"], strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    # The delayed scales of the first step are those of a rank's own tokens.
    most = 2e-3 if recipe == "fp8-delayed" else 1e-3
    assert losses == pytest.approx([loss for _, loss in alone["train"]], rel=most)
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert both["loss"] < both["train"][0][1] - 0.2
    assert [row["step"] for row in both["watched"]] == [row["step"] for row in alone["watched"]]
    for name, source in (("on-one", both), ("on-two", alone)):
        assert runs[name]["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert runs[name]["train"][:25] == source["train"][:25]


def test_a_loss_of_one_rank_that_is_not_finite_stops_all_by_its_windows(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(BROKEN)
    given = ["train", "--model", folder, "--data", text, "--steps", 4, "--batch", 4, "--seq", 32, "--shard"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, program]
    done = subprocess.run(
        list(map(str, [*launch, *given, "--eval-every", 4, "--out", tmp_path / "out"])),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        timeout=200,
    )
    assert done.returncode != 0
    said = {line for line in done.stderr.splitlines() if "of the data: the loss is nan" in line}
    assert len(said) == 1, done.stderr[-3000:]
    assert said.pop().startswith("parco: step 3, batch 2, windows ")


BROKEN = """
import math, os, sys
from parco.cli import main
from parco.trainer import Trainer

compute_loss = Trainer.compute_loss

def broken(self, *arguments, **named):
    loss = compute_loss(self, *arguments, **named)
    return loss * math.nan if os.environ["RANK"] == "1" and self.state.global_step == 2 else loss

Trainer.compute_loss = broken
sys.exit(main(sys.argv[1:]))
"""
