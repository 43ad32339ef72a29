"""One run: it learns, it goes on after a kill to the same bits, and what is broken stops it with a name."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.hub import tiny
from torch import Tensor

from parco import hub
from parco.cli import main
from parco.fitting.stages import Silent
from parco.report import curves
from parco.trainer import Settings, Trainer, run
from parco.training import RECIPES, products


class Killed(BaseException):
    pass


class KilledAfter(Silent):
    """Ends the process, as far as a test can, after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.trains = False

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.trains = name.startswith(("train", "tune"))

    def advance(self, n: int = 1) -> None:
        self.left -= n if self.trains else 0
        if self.left < 0:
            raise Killed


class Shown(Silent):
    """Keeps what is shown of the run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, text: str) -> None:
        self.texts.append(text)


def settings(folder: Path, text: Path, **changes: Any) -> Settings:
    given = {"steps": 8, "batch": 4, "seq": 32, "lr": 1e-2, "save_every": 2, "eval_every": 3} | changes
    return Settings(str(folder), (str(text),), **given)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_is_never_interrupted(folder: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    given = settings(folder, text, recipe=recipe, steps=6)
    whole = run(given, tmp_path / "whole", Silent())
    with pytest.raises(Killed):
        run(given, tmp_path / "killed", KilledAfter(4))
    assert sorted(path.name for path in (tmp_path / "killed").glob("*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "settings.json",
        "watch.jsonl",
    ]
    resumed = run(given, tmp_path / "killed", Silent(), resume=True)
    assert resumed["train"] == whole["train"] and resumed["held_out"] == whole["held_out"]
    assert resumed["loss"] == whole["loss"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_learns_and_leaves_a_model(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = Shown()
    done = run(settings(folder, text, steps=20), out, shown)
    assert "loss" not in shown.texts[0] and "tok/s" in shown.texts[0] and shown.texts[-1].startswith("loss ")
    assert done["train"][0][0] == 1 and done["train"][-1][0] == 20
    assert done["loss"] < done["train"][0][1] - 1
    assert done["tokens"] == 20 * 4 * 32 and done["skipped"] == 0
    assert done["tokens_per_second"] > 0 and done["mfu"] > 0 and done["peak_memory"] > 0
    assert json.loads((out / "result.json").read_text()) == done
    assert (out / "report.html").stat().st_size > 1000
    kept = sorted(path.name for path in out.iterdir())
    assert kept == [
        "checkpoint-18",
        "checkpoint-20",
        "model",
        "report.html",
        "result.json",
        "settings.json",
        "watch.jsonl",
    ]
    assert not list(out.rglob("*.bin")), "no pickled arguments"
    model = hub.load(out / "model").model
    windows = torch.tensor([tiny.tokenizer()(text.read_text())["input_ids"][-65:-33]])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=windows, labels=windows).loss < done["train"][0][1] - 1


def test_the_loss_at_the_end_is_that_of_a_plain_loop(folder: Path, text: Path, tmp_path: Path) -> None:
    done = run(settings(folder, text, steps=2, held=str(text)), tmp_path / "out", Silent())
    model = hub.load(tmp_path / "out" / "model").model
    tokens = tiny.tokenizer()(text.read_text())["input_ids"] + [1]
    rows = torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert done["held_out_windows"] == len(rows)
    # Batches of 4 windows, the last of fewer, each loss rounded to fp32; outputs are bf16 in both.
    assert done["loss"] == pytest.approx(loss, rel=2e-3)


def test_bf16_weights_and_8_bit_states_go_on_too(folder: Path, text: Path, tmp_path: Path) -> None:
    given = settings(folder, text, recipe="int8", weights="bf16", states="8bit")
    whole = run(given, tmp_path / "whole", Silent())
    with pytest.raises(Killed):
        run(given, tmp_path / "killed", KilledAfter(5))
    state = torch.load(tmp_path / "killed" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert state["lm_head.weight"]["exp_avg_codes"].dtype == torch.uint8
    resumed = run(given, tmp_path / "killed", Silent(), resume=True)
    assert resumed["train"] == whole["train"]
    assert whole["train"][-1][1] < whole["train"][0][1] - 0.5
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(tensor.dtype == torch.bfloat16 for tensor in one.values())
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "gemma3_text", "mixtral"])
def test_other_architectures_train(architecture: str, text: Path, tmp_path: Path) -> None:
    model = tiny.folder(tmp_path / "model", architecture)
    given = settings(model, text, recipe="mxfp8", steps=4, accumulate=2)
    with pytest.raises(Killed):
        run(given, tmp_path / "out", KilledAfter(3))
    resumed = run(given, tmp_path / "out", Silent(), resume=True)
    whole = run(given, tmp_path / "whole", Silent())
    assert resumed["train"] == whole["train"], "tied weights and all"
    assert resumed["train"][-1][1] < resumed["train"][0][1]


def test_passes_of_a_step_write_a_weight_once(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards: list[object] = []
    write = products.write

    def counting(operand: Any, x: Tensor, **how: Any) -> Any:
        if x.shape == (96, 64) and how["transposed"]:  # gate's and up's, as gradients of x want them
            backwards.append(operand)
        return write(operand, x, **how)

    monkeypatch.setattr(products, "write", counting)
    given = settings(folder, text, recipe="int8", steps=2, batch=8)
    counts = []
    for passes in (1, 4):
        backwards.clear()
        run(dataclasses.replace(given, accumulate=passes), tmp_path / str(passes), Silent())
        counts.append(len(backwards))
    assert counts[0] == counts[1] > 0


def test_a_configuration_alone_gets_new_weights(folder: Path, text: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    first, second, other = (
        run(settings(config, text, steps=1, seed=seed), tmp_path / name, Silent())
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first["train"] == second["train"] != other["train"]
    assert first["train"][0][1] == pytest.approx(math.log(tiny.VOCABULARY), rel=0.1)


def test_a_process_that_is_killed_leaves_whole_checkpoints(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", folder, "--data", text, "--steps", "400", "--batch", "2", "--seq", "32", "--save-every", "5"]
    command = [sys.executable, "-m", "parco.cli", "train", *map(str, words), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("out/checkpoint-*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = max(int(path.name[11:]) for path in tmp_path.glob("out/checkpoint-*"))
    assert before < 400
    again = command[3:]  # in this process: starting another takes seconds
    assert main(again) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*again, "--resume", "--lr", "0.5"]) == 2
    assert "--lr was None" in capsys.readouterr().err


def test_an_overflow_skips_the_step_and_the_run_recovers(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float]] = []
    step = Trainer.training_step

    def injected(self: Any, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        if self.state.global_step == 3:
            next(iter(self.model.parameters())).grad[5, 5] = math.inf
        return loss

    clip = Trainer._clip_grad_norm

    def seen_clip(self: Any, model: Any) -> Any:
        norm = clip(self, model)
        seen.append((math.isfinite(norm.item()), self.scaler.get_scale()))
        return norm

    monkeypatch.setattr(Trainer, "training_step", injected)
    monkeypatch.setattr(Trainer, "_clip_grad_norm", seen_clip)
    done = run(settings(folder, text, recipe="fp16", steps=10), tmp_path / "out", Silent())
    assert [finite for finite, _ in seen] == [index != 3 for index in range(10)]
    assert [scale for _, scale in seen] == [2.0**16] * 4 + [2.0**15] * 6
    assert done["skipped"] == 1
    assert done["loss"] < done["train"][0][1] - 0.5
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())


def test_a_gradient_that_no_scale_helps_stops_the_run(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.training_step

    def injected(self: Any, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        next(iter(self.model.parameters())).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "training_step", injected)
    with pytest.raises(FloatingPointError, match="not finite at any loss scale"):
        run(settings(folder, text, recipe="fp16", steps=99, eval_every=99), tmp_path / "fp16", Silent())
    with pytest.raises(
        FloatingPointError, match=r"step 1, batch 0, windows [\d, ]+ of the data: the gradient.*embed_tokens"
    ):
        run(settings(folder, text), tmp_path / "bf16", Silent())


def test_a_nan_names_the_batch_and_the_layer(folder: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = hub.load(folder, dtype=torch.float32, low_memory=False).model
    rows = torch.tensor(tiny.tokenizer()(text.read_text())["input_ids"][: 64 * 32]).view(-1, 32)
    tokens, counts = rows.unique(return_counts=True)
    rare = int(tokens[counts.argmin()])
    with torch.no_grad():
        model.get_input_embeddings().weight[rare, 1] = math.nan
    model.save_pretrained(broken)
    tiny.tokenizer().save_pretrained(broken)
    with pytest.raises(ValueError, match="embed_tokens"):
        run(settings(broken, text), tmp_path / "refused", Silent())

    whole = hub.load(folder, dtype=torch.float32, low_memory=False).model
    whole.load_state_dict(model.state_dict())
    args = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=50,
        per_device_train_batch_size=2,
        report_to="none",
        remove_unused_columns=False,
    )
    data = [{"input_ids": row, "labels": row, "window": torch.tensor(i)} for i, row in enumerate(rows)]
    trainer = Trainer(whole, args, train_dataset=data)
    holding = [i for i, row in enumerate(rows) if rare in row]
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan, first in model\.embed_tokens \(Embedding\)"
    ) as caught:
        trainer.train()
    named = [int(number) for number in str(caught.value).split("windows ")[1].split(" of")[0].split(", ")]
    assert set(named) & set(holding)


def test_a_full_disk_keeps_the_checkpoint_before(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save = torch.save
    saved: list[object] = []

    def full(value: Any, path: Any, *arguments: Any, **named: Any) -> None:
        saved.append(path)
        if len(saved) > 3:  # optimizer, scheduler and generators of the first checkpoint
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(value, path, *arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    given = settings(folder, text)
    with pytest.raises(OSError, match="the disk is full") as caught:
        run(given, out, Silent())
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "settings.json", "watch.jsonl"]
    monkeypatch.undo()
    resumed = run(given, out, Silent(), resume=True)
    assert resumed["train"] == run(given, tmp_path / "whole", Silent())["train"]


def test_what_makes_no_sense_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"recipe": "fp7"}, "unknown recipe 'fp7'"),
        ({"steps": 0}, "--steps 0 makes no sense"),
        ({"batch": 3, "accumulate": 2}, "--batch 3 cannot be passed in --accumulate 2"),
        ({"lr": -1.0}, "--lr -1"),
        ({"weights": "fp8"}, "--weights fp8 is none of fp32, bf16"),
        ({"states": "4bit"}, "--states 4bit"),
        ({"seq": 65}, "this model knows 64 positions"),
        ({"tokenizer": str(hub.embedded_path())}, "take its own"),
        ({"warmup": 9}, "--warmup 9 makes no sense: it must lie between 0 and 8"),
        ({"seed": -1}, "--seed -1"),
        ({"weight_decay": math.nan}, "--weight-decay nan"),
        ({"batch": 4096}, "windows to train on, and a pass takes 4096"),
    ):
        with pytest.raises(ValueError, match=words):
            run(settings(folder, text, **changes), tmp_path / "out", Silent())
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        run(settings(tmp_path, text), tmp_path / "out", Silent())
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        run(settings(folder, text), tmp_path / "out", Silent(), resume=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="no training run"):
        run(settings(folder, text), tmp_path / "other", Silent())
    with pytest.raises(ValueError, match="give precision="):
        Trainer(tiny.model("llama"), transformers.TrainingArguments(str(tmp_path), bf16=True, use_cpu=True))


def test_a_run_that_is_done_is_kept(folder: Path, text: Path, tmp_path: Path) -> None:
    given = settings(folder, text, steps=1)
    done = run(given, tmp_path / "out", Silent())
    changed = os.stat(tmp_path / "out" / "result.json").st_mtime_ns
    assert run(given, tmp_path / "out", Silent(), resume=True) == done
    assert os.stat(tmp_path / "out" / "result.json").st_mtime_ns == changed


def test_models_that_do_not_learn_to_go_on_are_refused(text: Path, tmp_path: Path) -> None:
    hub.save(tiny.store(tiny.model("llama")), tiny.tokenizer(), tmp_path / "stored")
    for given in (tmp_path / "stored", tmp_path / "stored" / "config.json"):
        with pytest.raises(ValueError, match="stored weights, which do not train"):
            run(settings(given, text), tmp_path / "out", Silent())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = transformers.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, **sizes)
    transformers.BertForMaskedLM(encoder).save_pretrained(tmp_path / "encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="sees the tokens that it is to predict"):
        run(settings(tmp_path / "encoder", text), tmp_path / "out", Silent())


def test_pickled_weights_are_trained_on_too(folder: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    one, other = (
        run(settings(model, text, steps=1, lr=None), tmp_path / f"of-{model.name}", Silent())
        for model in (folder, tmp_path / "pickled")
    )
    assert one["train"] == other["train"] and one["loss"] == other["loss"]


def test_every_held_out_window_judges(folder: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("import torch\n" * 30)
    given = [settings(folder, text, steps=1, held=str(short), batch=batch) for batch in (1, 3, 8)]
    found = [run(each, tmp_path / str(each.batch), Silent()) for each in given]
    assert found[0]["held_out_windows"] % 3 and found[0]["held_out_windows"] < 8
    # The first held-out windows, before and after other first steps: as many as there are in every batch size.
    model = hub.load(tmp_path / "3" / "model").model
    tokens = tiny.tokenizer()(short.read_text())["input_ids"] + [1]
    rows = torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert found[1]["loss"] == pytest.approx(loss, rel=1e-3)
    assert math.isfinite(found[2]["loss"])


@pytest.mark.parametrize("recipe", ["mxfp8", "fp16"])
def test_a_broken_checkpoint_names_the_file_and_the_checkpoint_before(
    folder: Path, text: Path, tmp_path: Path, recipe: str
) -> None:
    given = settings(folder, text, recipe=recipe)
    with pytest.raises(Killed):
        run(given, tmp_path / "out", KilledAfter(5))
    last = tmp_path / "out" / "checkpoint-4"
    read = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "watch.json"}
    for name in read | ({"scaler.pt"} if recipe == "fp16" else set()):
        whole = (last / name).read_bytes()
        (last / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged: remove .*checkpoint-4, .*goes on from checkpoint-2"):
            run(given, tmp_path / "out", KilledAfter(8), resume=True)
        (last / name).write_bytes(whole)
    shutil.rmtree(last)
    resumed = run(given, tmp_path / "out", Silent(), resume=True)
    assert resumed["train"] == run(given, tmp_path / "whole", Silent())["train"]


def test_what_a_run_was_made_of_must_not_change(folder: Path, text: Path, tmp_path: Path) -> None:
    data, model = tmp_path / "text.txt", tmp_path / "model"
    shutil.copytree(folder, model)
    data.write_text(text.read_text())
    given = settings(model, data)
    with pytest.raises(Killed):
        run(given, tmp_path / "out", KilledAfter(5))
    data.write_text(text.read_text() + "more")
    with pytest.raises(ValueError, match="holds a run whose text has changed since"):
        run(given, tmp_path / "out", Silent(), resume=True)
    data.write_text(text.read_text())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="holds a run whose model has changed since"):
        run(given, tmp_path / "out", Silent(), resume=True)


def test_one_process_at_a_time_trains_in_a_folder(folder: Path, text: Path, tmp_path: Path) -> None:
    class Another(Silent):
        refused = ""

        def advance(self, n: int = 1) -> None:
            if not self.refused:
                with pytest.raises(ValueError, match="another process trains in --out") as caught:
                    run(settings(folder, text), tmp_path / "out", Silent(), resume=True)
                self.refused = str(caught.value)

    progress = Another()
    short = tmp_path / "windows"  # made before, so that the first advance is a step's
    run(settings(folder, text, steps=1), short, Silent())
    run(settings(folder, text), tmp_path / "out", progress)
    assert progress.refused


def test_a_norm_beyond_fp32_is_told_from_a_gradient_that_is_not_finite(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.training_step

    def injected(self: Any, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        next(iter(self.model.parameters())).grad.fill_(1e30)
        return loss

    monkeypatch.setattr(Trainer, "training_step", injected)
    with pytest.raises(FloatingPointError, match="norm is inf, its squares are beyond fp32"):
        run(settings(folder, text), tmp_path / "out", Silent())


def test_the_log_of_a_run_that_goes_on_is_whole(folder: Path, text: Path, tmp_path: Path) -> None:
    given = settings(folder, text, steps=200, batch=1, seq=16, save_every=95, eval_every=150, watch_every=0)
    with pytest.raises(Killed):
        run(given, tmp_path / "killed", KilledAfter(100))
    resumed = run(given, tmp_path / "killed", Silent(), resume=True)
    assert resumed["train"] == run(given, tmp_path / "whole", Silent())["train"]


def test_a_page_that_a_full_disk_cuts_short_is_absent(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(runs: Any, gaps: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(curves, "write", full)
    with pytest.raises(OSError, match="the disk is full"):
        run(settings(folder, text, steps=1), tmp_path / "out", Silent())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-1",
        "model",
        "settings.json",
        "watch.jsonl",
    ]
    monkeypatch.undo()
    run(settings(folder, text, steps=1), tmp_path / "out", Silent(), resume=True)
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
