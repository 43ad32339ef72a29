"""The loss is a plain Transformers loop's; bytes are what a file would hold; memory and completions are those of the
model.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.fitting import small
from tests.fitting.conftest import Calibrated
from tests.report import example

from parco import hub
from parco.fitting import evaluate, summary
from parco.fitting.stages import Silent


def test_the_loss_is_a_plain_loops(calibrated: Calibrated) -> None:
    model, windows = calibrated.model(), calibrated.windows.held
    with torch.no_grad():
        plain = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    judged = evaluate.quality(model, windows, Silent())
    assert judged.loss == pytest.approx(sum(plain) / len(plain), abs=1e-4)
    assert judged.perplexity == pytest.approx(math.exp(judged.loss))
    assert (judged.kl, judged.top1, judged.original_loss) == (0.0, 1.0, judged.loss)


def test_divergence_and_agreement_are_zero_and_one_for_the_same_model_only(calibrated: Calibrated) -> None:
    model, windows = calibrated.model(), calibrated.windows.held
    same = evaluate.quality(model, windows, Silent(), calibrated.model())
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.top1 == 1.0
    other = evaluate.quality(small.model(initializer_range=0.2), windows, Silent(), model)
    assert other.kl > 0.1
    assert other.top1 < 0.9
    assert other.original_loss == pytest.approx(same.loss, abs=1e-6)


def test_a_completion_goes_on_from_the_prompt_within_the_context(small_folder: Path, calibrated: Calibrated) -> None:
    loaded = hub.load(small_folder)
    prompt = evaluate.sample_prompt(loaded.tokenizer, calibrated.windows.held)
    text = evaluate.complete(loaded.model, loaded.tokenizer, prompt, small.WINDOW)
    assert text
    assert text == evaluate.complete(loaded.model, loaded.tokenizer, prompt, small.WINDOW)
    assert len(loaded.tokenizer(prompt + text)["input_ids"]) <= 4 * small.WINDOW


def test_peak_memory_is_that_of_a_fresh_process(small_folder: Path, tmp_path: Path) -> None:
    peak = evaluate.peak_memory(small_folder)
    assert peak is not None and 50e6 < peak < 3e9
    assert evaluate.peak_memory(tmp_path) is None


def test_a_difference_of_losses_has_the_error_of_windows_paired(calibrated: Calibrated) -> None:
    windows = calibrated.windows.held
    judged = evaluate.quality(calibrated.model(), windows, Silent())
    assert judged.loss == pytest.approx(sum(judged.losses) / len(windows))
    assert evaluate.standard_error(judged.losses, [loss - 1 for loss in judged.losses]) == pytest.approx(0, abs=1e-6)
    assert evaluate.standard_error([1.0, 2.0, 6.0], [0.0, 0.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert evaluate.standard_error([1.0], [2.0]) is None


def test_a_better_alternative_is_told_beyond_the_error_only() -> None:
    chosen, rival, *_ = sorted(example.result()["alternatives"], key=lambda row: not row["chosen"])
    rival["loss"], rival["error"] = chosen["loss"] - 0.0123, 0.004
    said = "the uniform alternative int4:32 has a lower loss than the chosen plan, by 0.012 ± 0.004 nats per token"
    assert summary.better([chosen, rival], 48) == [f"{said} over 48 windows"]
    for error in (0.02, None):
        rival["error"] = error
        assert summary.better([chosen, rival], 48) == []
    assert summary.better([chosen], 48) == []
