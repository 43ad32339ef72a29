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
