"""A run's log and readings as TensorBoard's event files, in the folder `tensorboard` of the run."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import transformers

from parco.trainer.meter import Meter
from parco.training import Readings

FOLDER = "tensorboard"
_NAMES = {
    "loss": "loss/train",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "skipped": "skipped_steps",
    "loss_scale": "loss_scale",
}
"""What of Transformers' log goes where."""


def check() -> None:
    """ValueError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs tensorboard: pip install 'parco[tensorboard]'")


class TensorBoard(transformers.TrainerCallback):
    """Writes what `meter` puts into the log, held-out losses, and the readings that it is `told`.

    A run that goes on from a checkpoint hides what an earlier process wrote of later steps.
    """

    def __init__(self, out: Path, meter: Meter) -> None:
        check()
        self.folder, self.meter = out / FOLDER, meter
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        if state.is_world_process_zero:
            before = state.global_step + 1 if state.global_step else None
            self.writer = SummaryWriter(str(self.folder), purge_step=before)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.writer is None or not logs:
            return
        entry = state.log_history[-1]
        for name, tag in _NAMES.items():
            if name in entry:
                self._add(tag, entry[name], state.global_step)
        if "step_seconds" in entry:
            self._add("tokens_per_second", self.meter.tokens / entry["step_seconds"], state.global_step)
        if "eval_loss" in entry:
            # At the end all held-out windows judge, not those alone that were looked at before.
            tag = "loss/held_out_whole" if self.meter.judging else "loss/held_out"
            self._add(tag, entry["eval_loss"], state.global_step)
        self.writer.flush()

    def told(self, readings: Readings) -> None:
        """Signal to noise, underflow, saturation and amax of every operand of every layer, and gradients' norms."""
        if self.writer is None:
            return
        for tag, value in readings.scalars().items():
            self._add(tag, value, readings.step)
        self.writer.flush()

    def close(self) -> None:
        """Ends the files."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _add(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):  # where nothing is lost, signal to noise is infinite, which no axis shows
            self.writer.add_scalar(tag, value, step)
