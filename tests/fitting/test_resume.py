"""Killed at any stage and run again, a fit goes on and ends with the plan and the bytes of one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.fitting.conftest import EXTENT, Calibrated

import parco
from parco.fitting import apply, candidates, measure, table
from parco.fitting.stages import LAYOUT, Silent, Stages, seeded, void, write_whole
from parco.nn.blocks import groups

SCRIPT = """
import json, os, signal, sys
# Imported before the forks, once: that is most of the time of a small fit.
import transformers.generation, transformers.models.llama.modeling_llama, transformers.quantizers.auto
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from parco import job
from parco.fitting import alternatives, evaluate
from parco.fitting.stages import Silent

folder, text, out, whole = sys.argv[1:5]
evaluate.peak_memory = lambda folder: None
alternatives.FAMILIES = (("int4:32",),)
options = dict(data=text, size=0.5, methods=["int8:row", "int4:16"], heal=25, seed=2)

class Killed(Silent):
    def __init__(self, name, steps):
        self.name, self.steps, self.now, self.seen = name, steps, "", []
    def stage(self, name, total=None, done=0):
        self.now = name
        self.seen.append(name)
        if (name, 0) == (self.name, self.steps):
            os.kill(os.getpid(), signal.SIGKILL)
    def advance(self, n=1):
        if self.now == self.name:
            self.steps -= n
            if self.steps <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

def run(path, name="never", steps=0):
    child = os.fork()
    if child == 0:
        progress = Killed(name, steps)
        job.fit(folder, out=path, progress=progress, **options)
        print(json.dumps(progress.seen), flush=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert run(whole) == 0
for name, steps in (("calibrate", 2), ("candidates", 3), ("apply", 2), ("heal", 22), ("final", 1), ("save", 0)):
    status = run(out, name, steps)
    assert os.WIFSIGNALED(status), (name, status)
    assert not os.path.exists(out), name
assert run(out) == 0
"""


def test_killed_at_every_stage_it_ends_as_if_it_never_was(small_folder: Path, small_text: Path, tmp_path: Path) -> None:
    arguments = [str(path) for path in (small_folder, small_text, tmp_path / "killed", tmp_path / "whole")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    whole, killed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert killed["plan"] == whole["plan"]
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    stages = {stage["stage"]: stage["resumed"] for stage in killed["stages"]}
    assert stages["calibrate"] and stages["candidates"] and stages["heal"], "finished stages are not run again"
    first, *_, last = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert "calibrate" in first and "calibrate" not in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


class Counted(Silent):
    """What stages are told of, and how many steps are counted while they run."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None, int]] = []
        self.steps = 0

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.seen.append((name, total, done))

    def advance(self, n: int = 1) -> None:
        self.steps += n


def test_steps_of_an_earlier_run_are_done_before_and_not_counted_again(calibrated: Calibrated, tmp_path: Path) -> None:
    """Or the time left would be judged by steps that took none."""
    methods = {group.name: "int8:row" for group in groups(calibrated.model())}
    timings = measure.Timings("test", tmp_path / "timings.json")
    with Stages(tmp_path / "work", Silent()) as stages:
        judged, applied = stages.open("candidates"), stages.open("apply")

        def run() -> Counted:
            told, model = Counted(), calibrated.model()
            rows = candidates.judge(model, ["keep", "int8:row"], 1, calibrated.stage, judged, told)
            table.measure(model, rows, 16, 1 << 20, torch.bfloat16, timings, told)
            apply.apply_(model, methods, calibrated.windows, EXTENT, calibrated.stage, applied, told)
            return told

        first = run()
        assert [done for *_, done in first.seen] == [0, 0, 0]
        assert first.steps == sum(total or 0 for _, total, _ in first.seen)
        (judged.folder / "group-0001.json").unlink()
        (applied.folder / "part-002.safetensors").unlink()
        again = run()
        assert again.steps == 2
        assert [(total or 0) - done for _, total, done in again.seen] == [1, 0, 1]


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def dies(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_whole(tmp_path / "file", dies)
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "file", lambda path: void(path.write_text("whole")))
    with pytest.raises(RuntimeError, match="killed"):
        write_whole(tmp_path / "file", dies)
    assert (tmp_path / "file").read_text() == "whole"


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    with Stages(tmp_path, Silent()) as stages:
        stage = stages.open("one", value=1)
        (stage.folder / ".x.json.partial").write_text("half")
    with Stages(tmp_path, Silent()) as stages:
        assert list(stages.open("one", value=1).folder.iterdir()) == []


def test_a_changed_setting_never_meets_a_stale_stage_and_fresh_starts_over(tmp_path: Path) -> None:
    with Stages(tmp_path, Silent()) as stages:
        stage = stages.open("one", value=1)
        stage.write("result", 5)
        stage.finish()
        assert stages.open("one", value=1).whole
        assert not stages.open("one", value=2).whole
    with Stages(tmp_path, Silent()) as stages:
        assert stages.open("one", value=1).resumed
    with Stages(tmp_path, Silent(), fresh=True) as stages:
        assert not stages.open("one", value=1).whole


def test_a_stage_written_otherwise_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stages(tmp_path, Silent()) as earlier:
        stage = earlier.open("one", value=1)
        stage.finish()
    monkeypatch.setattr("parco.fitting.stages.LAYOUT", LAYOUT + 1)
    with Stages(tmp_path, Silent()) as later:
        assert not later.open("one", value=1).whole
        assert stage.whole


def test_draws_depend_on_the_seed_and_the_purpose() -> None:
    draws = {seeded(seed, name).initial_seed() for seed in (0, 1) for name in ("a", "b")}
    assert len(draws) == 4
    assert seeded(0, "a").initial_seed() in draws


def test_a_second_job_leaves_the_first_ones_folder_alone(small_folder: Path, small_text: Path, tmp_path: Path) -> None:
    with Stages(tmp_path / "out.work", Silent()):
        with pytest.raises(ValueError, match="another parco fit is working"):
            parco.fit(small_folder, data=small_text, size=0.5, out=tmp_path / "out")
        assert (tmp_path / "out.work" / "lock").exists()
