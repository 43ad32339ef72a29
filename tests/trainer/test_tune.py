"""A tuning: it learns, keeps the best state, goes on to the same bits, and leaves an adapter that is that state."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.hub import tiny
from tests.trainer.test_run import Killed, KilledAfter

from parco import adapters, hub, machine
from parco.cli import main
from parco.fitting.stages import Silent
from parco.trainer import TuneSettings, memory, method_of, packing, tune
from parco.trainer.pages import remake
from parco.trainer.tuner import TRAINED
from parco.trainer.windows import collate, split


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts whose completions follow from them."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    made = [{"prompt": f"def f{i}(", "completion": f"return {i % 7}" * (1 + i % 3)} for i in range(150)]
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def settings(folder: Path, data: Path, **changes: Any) -> TuneSettings:
    given = {"method": "lora(4)", "batch": 4, "seq": 32, "lr": 1e-2, "eval_every": 3, "save_every": 2} | changes
    return TuneSettings(str(folder), (str(data),), **given if "epochs" in given else {"steps": 6} | given)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    (file,) = [*out.glob("adapter/adapter_model.safetensors"), *out.glob("model/model.safetensors")]
    return load_file(file)


def loss_of(model: Any, held: Any) -> float:
    """Over all tokens that the loss is on, as a plain loop has it."""
    total, count = 0.0, 0
    for row in held:
        batch = collate([row])
        batch.pop("window")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        own = int((batch["labels"][:, 1:] >= 0).sum())
        total, count = total + loss.item() * own, count + own
    return total / count


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora(4, dropout=0.1)"},
        {"method": "dora(4)", "base": "int4:32", "states": "8bit"},
        {"method": "lora(4, init=pissa)", "recipe": "fp8-delayed"},
        {"method": "full"},
    ],
    ids=lambda changes: changes["method"],
)
def test_killed_and_resumed_is_never_interrupted(
    folder: Path, chats: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    given = settings(folder, chats, **changes)
    whole = tune(given, tmp_path / "whole", Silent())
    with pytest.raises(Killed):
        tune(given, tmp_path / "killed", KilledAfter(3))
    kept = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert kept == ["best.safetensors", "checkpoint-2", "settings.json"]
    resumed = tune(given, tmp_path / "killed", Silent(), resume=True)
    for name in ("train", "held_out", "loss", "before", "best_step", "trained"):
        assert resumed[name] == whole[name], name
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_tuning_learns_and_leaves_an_adapter_with_its_loss(folder: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tune(settings(folder, chats, steps=20), out, Silent())
    assert done["loss"] < done["before"] - 1
    assert done["before"] == done["held_out"][0][1] and done["held_out"][0][0] == 0
    assert json.loads((out / "result.json").read_text()) == done
    kept = sorted(path.name for path in out.iterdir())
    assert kept == ["adapter", "checkpoint-18", "checkpoint-20", "report.html", "result.json", "settings.json"]
    assert not list(out.rglob("*.bin")), "no pickled arguments"
    loaded = hub.load(folder)
    sizes = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert (done["parameters"], done["examples"], done["cut"]) == (sizes, 150, 0)
    assert done["trained"] == sum(tensor.numel() for tensor in tensors(out).values()) < 0.1 * sizes
    trained = load_file(out / "checkpoint-20" / TRAINED)
    assert sum(tensor.numel() for tensor in trained.values()) == done["trained"], "no base in a checkpoint"
    held = split([chats], None, loaded.tokenizer, 32, Silent(), packing.reader([chats], packed=True)).held
    assert len(held) == done["held_out_windows"] > 1
    # Held-out losses are sums in fp32, each pass rounded once; outputs are bf16 in both.
    assert loss_of(loaded.model, held) == pytest.approx(done["before"], rel=2e-3)
    adapters.load_(loaded.model, out / "adapter")
    assert loss_of(loaded.model, held) == pytest.approx(done["loss"], rel=2e-3)
    assert hub.load(folder).model.config.use_cache


def test_what_is_left_is_the_best_and_not_the_last(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(33 + i * i % 90) for i in range(600)))
    done = tune(settings(folder, text, steps=12, held=str(other), eval_every=1, save_every=12), out, Silent())
    losses = [loss for _, loss in done["held_out"]]
    assert done["loss"] == min(losses) < losses[-1], "another text is forgotten"
    assert done["held_out"][losses.index(min(losses))][0] == done["best_step"] < 12
    last = load_file(out / "checkpoint-12" / TRAINED)
    best = tensors(out)
    assert len(last) == len(best) and not any(
        torch.equal(tensor, other) for tensor in last.values() for other in best.values() if tensor.shape == other.shape
    )


def test_a_base_in_few_bits_is_left_beside_its_adapter(folder: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = "int4:32 + factor(rank=4)"
    done = tune(settings(folder, chats, method="lora(4, init=loftq)", base=base), out, Silent())
    dense = hub.load(folder)
    assert done["parameters"] == sum(parameter.numel() for parameter in dense.model.parameters())
    held = split([chats], None, dense.tokenizer, 32, Silent(), packing.reader([chats], packed=True)).held
    loaded = hub.load(out / "base")
    adapters.load_(loaded.model, out / "adapter")
    assert loss_of(loaded.model, held) == pytest.approx(done["loss"], rel=2e-3)
    again = tune(settings(out / "base", chats, method="bottleneck(4)"), tmp_path / "again", Silent())
    assert again["loss"] < again["before"] and again["base"] is None, "a stored base is tuned as it is"


def test_blocks_computed_twice_learn_the_same(folder: Path, chats: Path, tmp_path: Path) -> None:
    given = {"base": "nf4:32", "targets": ("all-linear",)}
    one = tune(settings(folder, chats, **given), tmp_path / "one", Silent())
    other = tune(settings(folder, chats, **given, checkpointing=True), tmp_path / "other", Silent())
    assert one["train"] == other["train"] and one["loss"] == other["loss"]


def test_each_step_gives_back_what_it_freed(
    folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.before()  # which does so too, once
    calls: list[int] = []
    monkeypatch.setattr(machine, "release_memory", lambda: calls.append(1))
    counts: list[int] = []
    for steps in (3, 5):
        calls.clear()
        tune(settings(folder, chats, steps=steps), tmp_path / str(steps), Silent())
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2 > 3


def test_the_head_may_be_adapted_too(folder: Path, chats: Path, tmp_path: Path) -> None:
    found = tune(settings(folder, chats, targets=("q_proj", "lm_head")), tmp_path / "out", Silent())
    assert any("lm_head" in name for name in tensors(tmp_path / "out"))
    assert found["loss"] < found["before"]


def test_epochs_count_windows_and_packing_needs_fewer(folder: Path, chats: Path, tmp_path: Path) -> None:
    packed = tune(settings(folder, chats, epochs=0.5), tmp_path / "packed", Silent())
    single = tune(settings(folder, chats, epochs=0.1, packing=False), tmp_path / "single", Silent())
    assert packed["settings"]["steps"] == math.ceil(0.5 * packed["windows"] / 4)
    assert single["windows"] + single["held_out_windows"] == 150 > 1.5 * packed["windows"]
    assert single["filled"] < packed["filled"] <= 1


def test_a_full_disk_keeps_the_checkpoint_before(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, saved = tmp_path / "out", torch.save, list[object]()

    def full(value: Any, path: Any, *arguments: Any, **named: Any) -> None:
        saved.append(path)
        if len(saved) > 3:  # optimizer, scheduler and generators of the first checkpoint
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(value, path, *arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        tune(settings(folder, text), out, Silent())
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in out.iterdir()) == ["best.safetensors", "checkpoint-2", "settings.json"]
    monkeypatch.undo()
    done = tune(settings(folder, text), out, Silent(), resume=True)
    assert done["loss"] < done["before"]


def test_changed_data_and_damaged_files_are_refused(folder: Path, chats: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(chats.read_text())
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    given = settings(base, mine)
    with pytest.raises(Killed):
        tune(given, tmp_path / "out", KilledAfter(3))
    mine.write_text(chats.read_text() + "\n" + json.dumps({"text": "import torch"}))
    with pytest.raises(ValueError, match="whose data has changed since"):
        tune(given, tmp_path / "out", Silent(), resume=True)
    mine.write_text(chats.read_text())
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match="whose model has changed since"):
        tune(given, tmp_path / "out", Silent(), resume=True)
    (base / "model.safetensors").write_bytes(weights)
    for name in ("best.safetensors", f"checkpoint-2/{TRAINED}"):
        whole = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(whole[:-10])
        with pytest.raises(ValueError, match="is damaged: "):
            tune(given, tmp_path / "out", Silent(), resume=True)
        (tmp_path / "out" / name).write_bytes(whole)
    assert tune(given, tmp_path / "out", Silent(), resume=True)["best_step"] == 6


def test_a_page_while_a_tuning_that_counts_epochs_goes_on(folder: Path, chats: Path, tmp_path: Path) -> None:
    given = settings(folder, chats, epochs=1.0, save_every=1, eval_every=1)
    with pytest.raises(Killed):
        tune(given, tmp_path / "out", KilledAfter(2))
    going = remake(tmp_path / "out")["so_far"]
    assert going is not None and going["steps"] == going["run"]["settings"]["steps"] > going["step"] == 2
    assert (tmp_path / "out" / "report.html").exists()


def test_names_of_methods() -> None:
    assert method_of("lora") == "lora(16)" and method_of("vera") == "vera(256)"
    assert method_of("pissa", 8, 16.0) == "lora(8, alpha=16, init=pissa)"
    assert method_of("adapter", 32, dropout=0.1) == "bottleneck(32, dropout=0.1)"
    assert method_of("lora(4, alpha=8)") == "lora(4, alpha=8)" and method_of("full") == "full"
    for words, wrong in (
        (("lorra",), "--method lorra is none of lora, dora"),
        (("vera", 8, 2.0), "--alpha is not for --method vera"),
        (("full", 8), "--rank is not for --method full"),
        (("lora(4)", 8), r"--rank is not for --method lora\(4\)"),
    ):
        with pytest.raises(ValueError, match=wrong):
            method_of(*words)


def test_wrong_use_is_one_line_and_leaves_nothing(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "import torch"}\n{"messages": [{"role": "user"}]}\n')
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "assistant", "content": "import torch"}]}\n')
    hub.save(tiny.store(tiny.model("llama")), tiny.tokenizer(), tmp_path / "stored")
    usual = [str(folder), "--data", str(chats), "--seq", "32", "--batch", "2", "--steps", "1"]
    for words, wrong in (
        ([str(folder), "--data", str(broken), "--seq", "32"], f"{broken}, line 2: message 1 (user): 'content' must"),
        ([str(folder), "--data", str(chat), "--seq", "32"], f"{chat}, line 1: messages are written by a chat template"),
        ([*usual, "--target", "q_prj"], "'q_prj' is the name of no module; the nearest are q_proj"),
        ([*usual, "--rank", "99"], "rank 99 is above the smaller side of"),
        ([*usual, "--rank", "0"], "lora: rank=0; a whole number from 1 up is needed"),
        ([*usual, "--method", "adapter", "--rank", "0"], "bottleneck: width=0; a whole number from 1 up is needed"),
        ([*usual, "--alpha", "0"], "lora: alpha=0"),
        ([*usual, "--method", "full", "--base", "int4:32"], "leave --base and --targets out"),
        ([*usual, "--base", "int99"], "int99"),
        ([*usual, "--epochs", "2"], "--epochs 2 and --steps 1: give one of them"),
        ([*usual, "--recipe", "fp7"], "unknown recipe"),
        ([*usual, "--template", "absent"], "--template names no file"),
        ([*usual, "--batch", "999"], "windows to train on, and a pass takes 999"),
        ([str(tmp_path / "stored"), *usual[1:], "--base", "int4:32"], "has stored weights already: leave --base out"),
        ([str(tmp_path / "stored"), *usual[1:], "--method", "full"], "stored weights, which do not train"),
    ):
        assert main(["tune", *words, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert wrong in said and said.count("\n") == 1, said
        assert not out.exists()


def test_the_command_tunes_chats_by_the_plain_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "import torch"}, {"role": "assistant", "content": "class Weight:"}]
    chat.write_text("\n".join([json.dumps({"messages": turns})] * 20))
    words = ["tune", folder, "--data", chat, "--template", "plain", "--seq", 64, "--batch", 2, "--steps", 2]
    assert main([*map(str, words), "--rank", "2", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "lora(2)" in shown.out and "→" in shown.out and "20, 0 cut" in shown.out
    assert main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == shown.out
    words = hub.load(folder).tokenizer
    kept = type(words).from_pretrained(tmp_path / "out" / "adapter")
    assert kept.apply_chat_template(turns, tokenize=False) == (
        "<s>### user\nimport torch\n\n### assistant\nclass Weight:</s>\n"
    )
    assert os.listdir(tmp_path / "out" / "adapter").count("adapter_config.json") == 1
