"""The Trainer of a tuning: its checkpoints hold what trains and no frozen base, and the best of all states is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from parco import machine
from parco.fitting.stages import Progress, write_whole
from parco.report import units
from parco.trainer import disk
from parco.trainer.examples import IGNORED
from parco.trainer.trainer import Trainer

TRAINED = "trained.safetensors"


class Tuner(Trainer):
    """As `Trainer`, of a model some of whose parameters are frozen. Held-out loss is the mean over all tokens that the
    loss is on, however they are spread over the windows.
    """

    def __init__(self, model: Any, args: transformers.TrainingArguments, **named: Any) -> None:
        # Of models that are loaded with stored weights Trainer takes only those that PEFT has given adapters.
        stored = vars(model).pop("is_quantized", False)
        try:
            super().__init__(model, args, **named)
        finally:
            if stored:
                vars(model)["is_quantized"] = stored

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        found = super().compute_loss(model, inputs, *arguments, **named)
        if model.training:
            return found
        # Of a pass this is the mean over its tokens, and the loop weighs passes by their rows.
        factor = _counted(inputs["labels"]) / (len(inputs["labels"]) * self._per_row)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **named: Any) -> Any:
        rows: Any = eval_dataset or self.eval_dataset
        column = "labels" if "labels" in rows.column_names else "input_ids"
        self._per_row = sum(_counted(row[column]) for row in rows) / len(rows)
        return super().evaluate(eval_dataset, *arguments, **named)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(exist_ok=True)
        save_file(trained(self.model), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with disk.read(Path(resume_from_checkpoint) / TRAINED) as file:
            put_(self.model, load_file(file))


def _counted(labels: Tensor) -> int:
    """Tokens that the loss is on: a model predicts none that is the first."""
    return int((labels[..., 1:] != IGNORED).sum())


def trained(model: Any) -> dict[str, Tensor]:
    """What training changes in `model`: its parameters that train, and the buffers of its state."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensors[name].detach().contiguous() for name in sorted(names)}


@torch.no_grad()
def put_(model: Any, state: dict[str, Tensor]) -> None:
    """Sets what `trained` gives of `model` to `state`, in place. Raises ValueError for other names or shapes."""
    mine = trained(model)
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in state.items()}:
        raise ValueError("these are not the tensors that train")
    for name, tensor in mine.items():
        tensor.copy_(state[name])


class Released(transformers.TrainerCallback):
    """Gives back after each step what it freed: between blocks in use the C library's heap grows from step to step."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        machine.release_memory()


class Best(transformers.TrainerCallback):
    """Keeps in `file` what was trained when the held-out loss was least, the state before the first step included; of
    equal ones the first.
    """

    def __init__(self, model: Any, file: Path, progress: Progress) -> None:
        self.model, self.file, self.progress = model, file, progress
        self.step, self.loss = 0, math.inf
        if file.exists():
            with disk.read(file), safe_open(file, "pt") as opened:
                kept = opened.metadata()
                self.step, self.loss = int(kept["step"]), float(kept["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        loss = metrics["eval_loss"]
        self.progress.note(f"step {state.global_step}: held-out loss {units.nats(loss)}")
        if loss < self.loss:
            self.step, self.loss = state.global_step, loss
            kept = {"step": str(self.step), "loss": repr(loss)}
            with disk.explained(self.file):
                write_whole(self.file, lambda path: save_file(trained(self.model), path, metadata=kept))

    def put_back_(self) -> None:
        """Makes the model what it was when it was best."""
        with disk.read(self.file) as file:
            put_(self.model, load_file(file))
