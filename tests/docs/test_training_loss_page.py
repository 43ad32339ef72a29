"""The page of what recipes cost in loss is made of the results files, which trainings of several sessions add up to."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import accumulated
from accumulated import page

from parco.training import RECIPES, Recipe


def result(recipe: str, seed: int, loss: float, text: str = "one", steps: int = 100) -> dict[str, Any]:
    """As a run leaves it."""
    settings = {
        "recipe": recipe,
        "seed": seed,
        "steps": steps,
        "batch": 16,
        "seq": 512,
        "data": ["/home/somebody/text"],
    }
    return {
        "recipe": recipe, "settings": settings, "loss": loss, "text": text, "tokens": 8192 * steps, "cpu": "one",
        "parameters": 7_000_000, "held_out_windows": 90, "mfu": 0.1, "peak_memory": 1, "tokens_per_second": 900.0,
        "layers": "many", "watched": [1], "runs_on": "cpu", "train": [[i, 5 - i / 100] for i in range(1, 101)],
        "held_out": [[i, loss + 1 - i / 100] for i in range(10, 101, 10)],
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accumulated, "RESULTS", tmp_path)
    return tmp_path


def test_the_page_says_what_the_results_say() -> None:
    assert page.PAGE.read_text() == page.render(page.longest(page.LOSSES), page.longest(page.PARTS))


def test_runs_of_several_sessions_add_up(results: Path) -> None:
    accumulated.add("claim", [result("bf16", 0, 2.0), result("nvfp4", 0, 2.02)])
    accumulated.add("claim", [result("nvfp4", 1, 2.5)])
    runs = accumulated.add("claim", [result("nvfp4", 0, 2.04), result("bf16", 1, 2.5)])
    assert [(run["recipe"], run["settings"]["seed"], run["loss"]) for run in runs] == [
        ("bf16", 0, 2.0), ("bf16", 1, 2.5), ("nvfp4", 0, 2.04), ("nvfp4", 1, 2.5),
    ]  # fmt: skip
    assert accumulated.kept("claim") == runs
    written = (results / "claim.json").read_text()
    assert "somebody" not in written
    assert len(json.loads(written)["runs"][0]["train"]) <= accumulated.POINTS
    with pytest.raises(ValueError, match="was trained on the text other"):
        accumulated.add("claim", [result("int8", 0, 2.0, text="other")])


def test_a_run_that_is_kept_is_not_run_again(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def run(settings: Any, folder: Path, progress: Any, *, resume: bool) -> Any:
        ran.append((settings.recipe, settings.seed))
        one = result(settings.recipe, settings.seed, 2.0)
        return one | {"settings": settings.to_json(), "tokens": 16384}

    monkeypatch.setattr(accumulated, "run", run)
    monkeypatch.setattr(accumulated, "texts", lambda out: (out / "text", out / "held.txt"))
    names = {"plain": "bf16", "few bits": "nvfp4"}
    for _ in range(2):
        runs = accumulated.train("claim", names, 16384, ["plain", "few bits"], [0, 1], tmp_path / "out")
    assert ran == [("bf16", 0), ("nvfp4", 0), ("bf16", 1), ("nvfp4", 1)]
    assert len(runs) == 4
    other = tmp_path / "out" / "int8-2-seed0"
    other.mkdir(parents=True)
    done = run(accumulated.settings_of("int8", 0, 16384, tmp_path), other, None, resume=False)
    (other / "result.json").write_text(json.dumps(done))
    del ran[:]
    assert len(accumulated.train("claim", names | {"int8": "int8"}, 16384, [], [0], tmp_path / "out")) == 5
    assert not ran


def test_what_is_not_measured_is_said() -> None:
    empty = page.render([], [])
    assert empty.count(page.MISSING) > 2 * len(RECIPES)
    runs = [result("bf16", 0, 2.0), result("bf16", 1, 2.2), result("nvfp4", 0, 2.02), result("nvfp4", 1, 2.244)]
    rows = {row.split("|")[1].strip(" `"): row for row in page.losses_table(runs).splitlines()}
    assert "2 of 3" in rows["nvfp4"]
    assert "+1.50% ± 0.50%" in rows["nvfp4"]
    assert rows["int8"].count(page.MISSING) == 2
    assert "0.9 M" not in page.curve(runs)
    assert "`nvfp4`" in page.curve(runs)
    lone = page.losses_table([result("nvfp4", 0, 2.02)])
    assert page.MISSING in next(row for row in lone.splitlines() if "nvfp4" in row)


def test_an_effect_within_two_errors_is_none_at_this_scale() -> None:
    without = page.VARIANTS["nvfp4 without Hadamard transform"][0]
    losses = [("nvfp4", 2.0, 2.0), (without, 2.2, 1.9), ("bf16", 1.9, 1.9)]
    runs = [result(recipe, seed, loss) for recipe, *both in losses for seed, loss in enumerate(both)]
    row = next(row for row in page.parts_table(runs).splitlines() if "without Hadamard" in row)
    assert row.endswith("no effect at this scale |")
    row = next(row for row in page.parts_table([*runs[:2], result(without, 0, 2.1)]).splitlines() if "Hadamard" in row)
    assert row.endswith("+5.00%, one seed |")


def test_every_part_is_one_that_the_recipe_has() -> None:
    for name, (recipe, whole) in page.VARIANTS.items():
        assert str(Recipe.parse(recipe)) == recipe
        if whole:
            assert name.startswith(f"{whole} without ")
            assert Recipe.parse(recipe) != RECIPES[whole]
            assert Recipe.parse(recipe).ends == RECIPES[whole].ends
