"""The whole job on a small model: what it promises of the result, of the folder, and of what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import small
from transformers import AutoModelForCausalLM

import parco
from parco.fitting import alternatives, calibrate, evaluate
from parco.fitting.result import Result
from parco.fitting.size import stored_bytes
from parco.fitting.stages import Silent, Stages

METHODS = ("int8:row", "int4:16", "factor(0.5)>>int8:row")
OPTIONS: dict[str, Any] = {"methods": METHODS, "heal": 4, "seed": 1}


@pytest.fixture(autouse=True)
def _no_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory has a test of its own; here its half minute of imports would be spent for every fit."""
    monkeypatch.setattr(evaluate, "peak_memory", lambda folder: 1 << 20)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit") / "fitted"


@pytest.fixture
def result(small_folder: Path, small_text: Path, out: Path) -> Result:
    """One fit for all tests of this module: the second call finds the folder and reads it."""
    if not out.exists():
        parco.fit(small_folder, data=small_text, size=0.5, out=out, **OPTIONS)
    return json.loads((out / "result.json").read_text())


def test_the_size_is_kept_and_the_columns_are_measured(result: Result) -> None:
    original, fitted = result["original"], result["fitted"]
    assert fitted["bytes"] <= 0.5 * result["checkpoint_bytes"] == 0.5 * original["bytes"]
    assert result["target"] == {"kind": "size", "value": 0.5, "reached": fitted["fraction"], "met": True}
    assert fitted["kl"] > 0 and 0.3 < fitted["top1"] <= 1
    assert (original["kl"], original["top1"]) == (0.0, 1.0)
    assert abs(fitted["loss"] - original["loss"]) < 0.5
    assert all(column[key] > 0 for column in (original, fitted) for key in ("decode", "prefill", "loss", "perplexity"))
    assert set(result) == set(Result.__annotations__)


def test_the_saved_folder_holds_what_the_result_says(result: Result, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert stored_bytes(model) == result["fitted"]["bytes"] == result["plan"]["bytes"]
    assert (out / "model.safetensors").stat().st_size <= 0.5 * result["checkpoint_bytes"]
    assert {path.name for path in out.iterdir()} >= {
        "report.html",
        "result.json",
        "plan.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert json.loads((out / "plan.json").read_text()) == result["plan"]
    assert not out.with_name("fitted.work").exists(), "the work folder goes when the job is done"
    with torch.no_grad():
        assert bool(model(torch.arange(10)[None]).logits.isfinite().all())


def test_every_group_has_a_row_with_what_was_passed_over(result: Result) -> None:
    assert [row["group"] for row in result["groups"]] == [group for group, _ in result["plan"]["choices"]]
    assert sum(row["bytes"] for row in result["groups"]) <= result["plan"]["bytes"]
    for row in result["groups"]:
        assert row["method"] in ("keep", *METHODS)
        assert row["method"] not in [passed["method"] for passed in row["passed"]]
        assert all(passed["reason"] for passed in row["passed"])
        assert row["kernel"]
        times = [timed["decode_seconds"] for timed in (row, *row["passed"])]
        assert all((seconds is None) == (row["kind"] == "embed") for seconds in times), "lookups are not timed"
    assert sum(point["chosen"] for point in result["frontier"]) == 1
    assert sum(point["measured_loss"] is not None for point in result["frontier"]) >= 2


def test_uniform_alternatives_fit_into_the_plans_bytes_and_were_healed_alike(result: Result) -> None:
    rows = result["alternatives"]
    assert [row["chosen"] for row in rows].count(True) == 1
    assert {row["healed_steps"] for row in rows} == {4}
    assert all(row["bytes"] <= result["plan"]["bytes"] for row in rows)
    names = " ".join(row["name"] for row in rows)
    assert all(part in names for part in ("int4:32", "int3:32", ">>int8:row", ">>int4:"))


def test_the_same_command_gives_the_same_plan_and_the_same_bytes(
    result: Result, small_folder: Path, small_text: Path, out: Path, tmp_path: Path
) -> None:
    again = parco.fit(small_folder, data=small_text, size=0.5, out=tmp_path / "again", **OPTIONS)
    assert again["plan"] == result["plan"]
    for name in ("model.safetensors", "config.json", "plan.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_a_loss_budget_is_honoured_on_the_held_out_text(
    small_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "FAMILIES", ())
    found = parco.fit(small_folder, data=small_text, loss=0.05, out=tmp_path / "fitted", **OPTIONS)
    assert found["target"]["met"] and found["fitted"]["loss"] - found["original"]["loss"] <= 0.05
    assert found["fitted"]["bytes"] < found["original"]["bytes"]


def test_a_foreign_model_without_data_also_reads_its_own_text(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "FAMILIES", ())
    monkeypatch.setattr(parco.hub, "embedded_texts", lambda: parco.hub.Texts(small.text(150), small.text(300)))
    found = parco.fit(small_folder, size=0.6, out=tmp_path / "fitted", methods=METHODS, heal=0)
    assert found["data"]["generated_windows"] == 4
    assert "wrote itself" in found["data"]["source"]
    assert found["heal"] is None
    assert not any(point["healed_loss"] for point in found["frontier"])


def test_without_healing_or_choice_the_model_is_the_original(
    small_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "FAMILIES", ())
    found = parco.fit(small_folder, data=small_text, size=1.0, out=tmp_path / "fitted", methods=("keep",))
    assert found["fitted"]["bytes"] == found["original"]["bytes"]
    assert found["fitted"]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_large_model_takes_the_frugal_way(
    small_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bound from which on a model counts as large, put below the small one."""
    for place in (
        "size.LARGE",
        "candidates.LARGE",
    ):
        monkeypatch.setattr(f"parco.fitting.{place}", 0)
    monkeypatch.setattr("parco.fitting.candidates.ROWS", (2048, 16))
    monkeypatch.setattr("parco.fitting.candidates.WIDEST_FACTOR", 50)
    monkeypatch.setattr(calibrate.Extent, "for_model", lambda parameters: calibrate.Extent(6, 2, 1, 3))
    found = parco.fit(small_folder, data=small_text, size=0.5, out=tmp_path / "fitted", methods=METHODS)
    assert found["target"]["met"] and found["heal"] is None
    assert found["data"]["held_out_windows"] == 3
    assert [row["name"] for row in found["alternatives"]] == ["chosen plan"]
    assert len([point for point in found["frontier"] if point["measured_loss"] is not None]) == 2
    assert any("uniform alternatives were not run" in warning for warning in found["warnings"])
    for row in found["groups"]:
        considered = [row["method"], *(passed["method"] for passed in row["passed"])]
        wide = max(max(shape) for shape in row["shapes"]) > 50
        assert any("factor" in method for method in considered) != (wide or row["kind"] == "embed"), row["group"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["int9:32"]}, "int9:32.*known"),
        ({"methods": ["magic"]}, "magic.*known"),
        ({"size": 0.5, "loss": 0.1}, "one of --size, --speed and --loss"),
        ({"size": 1.5}, "--size 1.5"),
        ({"loss": -1.0}, "--loss -1"),
        ({"heal": -2}, "--heal -2"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        parco.fit(tmp_path / "absent", out=tmp_path / "fitted", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_a_window_is_refused_and_leaves_nothing(small_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def")
    with pytest.raises(ValueError, match=r"shorter than one window: it has .* tokens and one window is 32"):
        parco.fit(small_folder, data=text, out=tmp_path / "fitted")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 0.05}, "the smallest plan takes"), ({"speed": 50.0}, "the fastest plan")]
)
def test_a_target_out_of_reach_names_the_best_reachable(
    options: dict[str, Any], message: str, small_folder: Path, small_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        parco.fit(small_folder, data=small_text, out=tmp_path / "fitted", methods=METHODS, **options)
    assert not (tmp_path / "fitted").exists()


def test_two_fits_do_not_work_in_one_folder(small_folder: Path, small_text: Path, tmp_path: Path) -> None:
    with Stages(tmp_path / "fitted.work", Silent()), pytest.raises(ValueError, match="another parco fit"):
        parco.fit(small_folder, data=small_text, out=tmp_path / "fitted")


def test_a_full_disk_is_one_clear_error_and_leaves_no_output(
    small_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("parco.fitting.stages.save_file", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        parco.fit(small_folder, data=small_text, size=0.5, out=tmp_path / "fitted", methods=METHODS)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "fitted").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_long_methods_list_is_canonical_and_keeps_keep() -> None:
    from parco.fitting.candidates import parse_methods

    assert parse_methods(["int4:32", " int4:32", "int8:row"]) == ["keep", "int4:32", "int8:row"]
