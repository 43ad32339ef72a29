"""Recipes side by side: what is compared is the same but for the recipe, and the table says what the runs say."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from parco.cli import main
from parco.fitting.stages import Silent
from parco.report import curves
from parco.trainer import Settings, Trainer, compare, gaps, run
from parco.training import RECIPES


def settings(folder: Path, text: Path, **changes: Any) -> Settings:
    return Settings(str(folder), (str(text),), **{"steps": 4, "batch": 2, "seq": 32, "eval_every": 2} | changes)


def test_recipes_train_on_the_same_weights_and_order(folder: Path, text: Path, tmp_path: Path) -> None:
    written = "; ".join(f"{name}={getattr(RECIPES['bf16'], name)}" for name in ("output", "grad_input", "grad_weight"))
    found = compare(settings(folder, text), ["bf16", written + "; ends=0.0", "nvfp4"], tmp_path, Silent(), seeds=2)
    first, same, low = found["gaps"]
    assert first["gap"] == same["gap"] == same["error"] == 0
    assert low["gap"] != 0 and low["error"] is not None and low["error"] > 0
    assert len(found["runs"]) == 6
    one, other = (run["train"] for run in found["runs"] if run["recipe"] == "bf16")
    assert one != other, "another seed is another order"
    assert json.loads((tmp_path / "result.json").read_text())["gaps"] == found["gaps"]
    assert (
        compare(
            settings(folder, text), ["bf16", written + "; ends=0.0", "nvfp4"], tmp_path, Silent(), seeds=2, resume=True
        )
        == found
    )


def test_a_recipe_that_fails_leaves_the_others(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.training_step

    def injected(self: Any, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        if "int8" in self.args.output_dir and self.state.global_step == 2:
            next(iter(self.model.parameters())).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "training_step", injected)
    given = [
        "train",
        "--model",
        folder,
        "--data",
        text,
        "--steps",
        4,
        "--batch",
        2,
        "--seq",
        32,
        "--out",
        tmp_path / "a",
    ]
    assert main([*map(str, given), "--compare", "bf16,int8,mxfp8"]) == 2
    shown = capsys.readouterr()
    assert re.search(r"bf16 +\d\.\d{4}", shown.out) and re.search(r"mxfp8 +\d\.\d{4} +[+-]\d", shown.out)
    assert "int8" not in shown.out
    assert "1 of the runs failed, the others are above: int8, seed 0, stopped at step 3" in shown.err
    found = json.loads((tmp_path / "a" / "result.json").read_text())
    assert [gap["recipe"] for gap in found["gaps"]] == ["bf16", "mxfp8"]
    assert [(each["recipe"], each["seed"]) for each in found["failed"]] == [("int8", 0)]
    with pytest.raises(FloatingPointError):  # nothing can be beside it
        compare(settings(folder, text), ["int8", "bf16"], tmp_path / "b", Silent())


def test_a_folder_that_holds_something_else_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    one = settings(folder, text, steps=1)
    run(one, tmp_path / "one", Silent())
    before = (tmp_path / "one" / "result.json").read_text()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine").touch()
    for place, resume, error, words in (
        ("one", False, FileExistsError, "holds a run of one recipe"),
        ("one", True, FileExistsError, "holds a run of one recipe"),
        ("notes", False, FileExistsError, "no training run"),
        ("absent", True, FileNotFoundError, "holds no training run"),
    ):
        with pytest.raises(error, match=words):
            compare(one, ["bf16", "int8"], tmp_path / place, Silent(), resume=resume)
    assert (tmp_path / "one" / "result.json").read_text() == before


def test_long_recipes_have_folders(folder: Path, text: Path, tmp_path: Path) -> None:
    long = str(RECIPES["nvfp4"].with_(ends=0.3)).replace(" @ ", " " * 40 + " @ ")
    compare(settings(folder, text, steps=1), ["bf16", long], tmp_path / "out", Silent())
    assert all(len(path.name) < 130 for path in (tmp_path / "out").iterdir())


def result(recipe: str, seed: int, loss: float, speed: float) -> Any:
    return {
        "recipe": recipe, "settings": {"seed": seed, "steps": 10}, "loss": loss, "tokens_per_second": speed, "mfu": 0.5,
        "peak_memory": 10**9, "skipped": 1, "held_out": [[5, loss + 1], [10, loss]], "train": [[5, loss]],
        "tokens": 100, "parameters": 7, "cpu": "<b>cpu</b>", "threads": 2,
        "watched": [], "said": [],
    }  # fmt: skip


def test_gaps_are_paired_by_seed() -> None:
    runs = [
        result("bf16", 0, 2.0, 100),
        result("int8", 0, 2.2, 150),
        result("bf16", 1, 4.0, 100),
        result("int8", 1, 4.8, 250),
    ]
    first, other = gaps(runs)
    assert (first["gap"], first["error"], first["times"]) == (0, 0, 1)
    assert other["gap"] == pytest.approx(0.15)
    assert other["error"] == pytest.approx(0.05)  # 0.1 and 0.2: deviation 0.0707, over the root of 2
    assert other["times"] == pytest.approx(2.0)
    assert other["loss"] == pytest.approx(3.5) and other["skipped"] == 2
    assert curves.rise(other) == "+15.00% ± 5.00%"
    assert gaps(runs[:2])[1]["error"] is None


def test_the_page_shows_every_run(tmp_path: Path) -> None:
    runs = [result("bf16", 0, 2.0, 100), result("int8", 0, 2.2, 150)]
    figure = curves.figure(runs, gaps(runs))
    lines = {(trace.name, tuple(trace.x), tuple(trace.y)) for trace in figure.data if trace.type == "scatter"}
    assert ("bf16", (50, 100), (3.0, 2.0)) in lines
    assert any(name == "int8" and y == pytest.approx((100 * (3.2 / 3 - 1), 10)) for name, _, y in lines)
    curves.write(runs, gaps(runs), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "int8" in page and not re.search(r"<script[^>]+src=", page)
    alone = curves.figure(runs[:1], gaps(runs[:1]))
    assert [trace.name for trace in alone.data] == ["held out", "training"]
    titles = [(drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text) for drawn in (figure, alone)]
    losses = ("held-out loss, nats per token", "loss, nats per token")
    assert titles == [("tokens trained on", loss) for loss in losses], "alone both losses are on one axis"
    row = {"step": 5, "product": "output", "operand": "x", "median_snr_db": 30.0, "worst_snr_db": 20.0}
    row |= {"worst_layer": "<i>layer", "underflow": 0.25, "saturated": 0.0}
    watched = curves.figure([runs[0] | {"watched": [row]}], gaps(runs[:1])).data[-1]
    assert (watched.name, watched.x, watched.y) == ("output: x", (50,), (20.0,))
    assert watched.hovertext[0].startswith("&lt;i&gt;layer; over all layers 25.0% became 0")


def test_the_command_prints_a_table(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "--model", folder, "--data", text, "--steps", 2, "--batch", 2, "--seq", 32]
    assert main([*map(str, given), "--out", str(tmp_path / "a"), "--compare", "bf16,int8"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"bf16 +\d\.\d{4}", shown) and re.search(r"int8 +\d\.\d{4} +[+-]\d\.\d\d%", shown)
    assert main([*map(str, given), "--out", str(tmp_path / "b"), "--recipe", "mxfp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "mxfp8" and math.isfinite(found["loss"])
    for words, wrong in (
        (["--compare", "bf16"], "give two or more recipes"),
        (["--recipe", "fp7"], "unknown recipe"),
        (["--compare", "bf16,int8", "--seeds", "0"], "--seeds 0"),
        (["--heldout", "absent.txt"], "absent.txt"),
    ):
        assert main([*map(str, given), "--out", str(tmp_path / "c"), *words]) == 2
        assert wrong in capsys.readouterr().err
        assert not (tmp_path / "c").exists()
