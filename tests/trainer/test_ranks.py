"""`parco train` under torchrun: several ranks train as one, and each reads the other's checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEPS = 50


def train(folder: Path, text: Path, out: Path, *words: str, ranks: int = 1) -> dict[str, Any]:
    """result.json of the command line's own run."""
    given = ["--model", folder, "--data", text, "--steps", STEPS, "--batch", 4, "--seq", 32, "--lr", "3e-4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "parco.cli", "train", *given, "--save-every", 25, "--out", out, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(("way", "recipe"), [("DDP", "fp8-delayed"), ("FSDP2", "fp16")])
def test_two_ranks_train_as_one(folder: Path, text: Path, tmp_path: Path, way: str, recipe: str) -> None:
    words = ["--recipe", recipe, *(["--shard"] if way == "FSDP2" else [])]
    alone = train(folder, text, tmp_path / "alone", *words)
    both = train(folder, text, tmp_path / "both", *words, ranks=2)
    assert f"2 ranks, {way}" in both["runs_on"]
    steps, losses = zip(*both["train"], strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    # The delayed scales of the first step are those of a rank's own tokens.
    most = 2e-3 if recipe == "fp8-delayed" else 1e-3
    assert losses == pytest.approx([loss for _, loss in alone["train"]], rel=most)
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert both["loss"] < both["train"][0][1] - 0.2
    for source, target, ranks in ((tmp_path / "both", "on-one", 1), (tmp_path / "alone", "on-two", 2)):
        out = tmp_path / target
        shutil.copytree(source / "checkpoint-25", out / "checkpoint-25")
        shutil.copy(source / "settings.json", out)
        other = train(folder, text, out, *words, "--resume", ranks=ranks)
        assert other["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert other["train"][:25] == json.loads((source / "result.json").read_text())["train"][:25]


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
