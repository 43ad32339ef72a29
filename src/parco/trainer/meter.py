"""How far a run is and how fast: to whom it may concern, and into the log."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import transformers

from parco import machine
from parco.fitting.stages import Progress
from parco.nn import Site, linears
from parco.report import units
from parco.trainer.trainer import Trainer


class Meter(transformers.TrainerCallback):
    """Tells the progress how far the run is, and the log how long its steps take."""

    def __init__(self, trainer: Trainer, tokens: int, flops: float, progress: Progress) -> None:
        """Of steps of `tokens` tokens, each of which takes `flops` operations."""
        self.trainer, self.progress = trainer, progress
        self.tokens, self.flops = tokens, flops
        self.peaks = machine.peaks()
        self.seconds: list[float] = []
        self.spent = 0.0
        self.loss: float | None = None
        self.judging = False
        """Whether the held-out windows are the stage that progress counts."""

    def rate(self, seconds: float) -> tuple[float, float]:
        """Tokens per second of a step of `seconds`, and their share of the peak."""
        speed = self.tokens / seconds
        return speed, speed * self.flops / (2 * self.peaks.multiply_adds("bf16"))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= control.should_save  # or a run that goes on from here logs a mean over fewer steps
        self.seconds.append(_now() - self.began)
        self.spent += self.seconds[-1]
        if self.trainer.check_scale():
            scale = self.trainer.scaler.get_scale()
            self.progress.note(f"step {state.global_step}: skipped, loss scale now {scale:g}")
        self.progress.advance()
        speed, share = self.rate(statistics.median(self.seconds[-20:]))
        loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
        self.progress.show(f"{loss}{units.speed(speed)}, {units.percent(share)} of the machine's peak")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.judging:
            self.progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.loss = logs["loss"]
        entry = state.log_history[-1]
        entry["step_seconds"] = statistics.median(self.seconds)
        entry["skipped"] = self.trainer.skipped
        if self.trainer.scaler is not None:
            entry["loss_scale"] = self.trainer.scaler.get_scale()
        self.seconds.clear()


def flops_per_token(model: Any, length: int, frozen: bool = False) -> float:
    """Operations of a step for each token of windows of `length`, of matrices that train or are `frozen`."""
    config = model.config.get_text_config()
    matrices = sum(_multiplied(site, config) for site in linears(model).values())
    # Forward and backward: 6 per weight and token, 4 without the weight's own gradient, and the two products of causal
    # attention, half of them masked.
    return (4 if frozen else 6) * matrices + 6 * config.num_hidden_layers * config.hidden_size * length


def _multiplied(site: Site, config: Any) -> float:
    """Numbers of a matrix that a token is multiplied by: of experts those of the few that it goes to."""
    rows, columns = site.shape
    if site.kind != "expert":
        return rows * columns
    experts = len(getattr(site.module, site.expert[0]))
    return rows * columns * int(getattr(config, "num_experts_per_tok", 1)) / experts


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
