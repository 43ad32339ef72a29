"""Heal: a few steps of training that bring the changed model's outputs back to the original's.

The loss is KL(original || changed) over the full distribution at every position of calibration windows. Quantized
matrices train as rounded latents (latent.py), factors, norms, biases and kept matrices directly. The original's last
hidden states on the training windows are computed once and shared by everything that is healed on them; only its norm
and head run again. What is kept is the best state by KL on the check windows, the state before the first step among
them, so that healing never makes a model worse there.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parco.fitting import size
from parco.fitting.latent import Trained
from parco.fitting.result import HealRecord
from parco.fitting.stages import Progress, Stage, seeded
from parco.fitting.stream import Stream, windows_in_batches
from parco.fitting.texts import Windows
from parco.nn import Embedding, Experts, Linear, StoredWeight, matrix

ROWS = 2
"""Windows per step."""

STEPS = 20
RATES = {"low_rank": 1e-3, "scale": 3e-4, "dense": 1e-4}
"""Adam's rates for a model that has lost FULL_RATE_KL or more. A smaller loss leaves less to learn and the same noise
in every step, so the rates fall with its square root."""
FULL_RATE_KL = 0.05
EVERY = 20
"""Steps between checkpoints; the check windows are evaluated as often."""


def automatic_steps(parameters: int) -> int:
    return STEPS if parameters <= size.LARGE else 0


@dataclass
class Teacher:
    """The original: its last hidden states on the training windows, and its norm and head."""

    stream: Stream
    tokens: Tensor
    hidden: Tensor

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        return self.stream.leave(self.hidden[rows])


@torch.no_grad()
def teach(original: nn.Module, windows: Windows, steps: int, seed: int, stage: Stage, progress: Progress) -> Teacher:
    """The teacher for `steps` steps; its hidden states are in `stage`, computed at most once."""
    wanted = min(windows.calibration.shape[0], steps * ROWS)
    order = torch.randperm(windows.calibration.shape[0], generator=seeded(seed, "teacher"))[:wanted]
    tokens = windows.calibration[order]
    stream = Stream(original)
    if not stage.whole:
        progress.stage("teacher", len(stream.names))
        with stream.outer():
            hidden = torch.cat([stream.enter(tokens[part]) for part in windows_in_batches(tokens, 4)])
        for index in range(len(stream.names)):
            with stream.block(index) as run:
                for part in windows_in_batches(hidden, 4):
                    hidden[part] = run(hidden[part])
            progress.advance()
        stage.write_tensors("hidden", {"hidden": hidden})
        stage.finish()
    return Teacher(stream, tokens, stage.read_tensors("hidden")["hidden"])


def heal(
    model: nn.Module,
    original: nn.Module,
    teacher: Teacher,
    check: Tensor,
    targets: Stage,
    steps: int,
    seed: int,
    stage: Stage,
    progress: Progress,
) -> HealRecord:
    """Train `model`, which holds StoredWeights, in place for `steps` steps; resumes from the last checkpoint in
    `stage`.

    check: windows [W, T]; targets: the calibrated stage that holds the original's log-probabilities on them. Leaves the
    best state in the model, in `stage` (read it back with `restore`), and returns what happened.
    """
    patient = _Patient(model, original, seed)
    run = _Run(patient, teacher, check, targets, steps, stage)
    progress.stage("heal", steps, run.begun)
    try:
        run.resume()
        while run.step < steps:
            run.advance(seed)
            progress.advance()
        patient.load(run.best)
        patient.write_back()
    finally:
        patient.release()
    record = run.record()
    stage.write_tensors("healed", _changed_state(model))
    stage.write("record", record)
    stage.drop("checkpoint.safetensors")
    stage.finish()
    return record


def restore(model: nn.Module, stage: Stage) -> HealRecord:
    """Put a healed stage's tensors into a model to which the same plan was applied."""
    tensors = stage.read_tensors("healed")
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]
    return stage.read("record")


def _changed_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by its first name (tied ones once)."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


class _Patient:
    """A model whose modules compute with trained leaves, in float32."""

    def __init__(self, model: nn.Module, original: nn.Module, seed: int) -> None:
        self.model = model
        self.trained = Trained(seeded(seed, "heal"))
        self.patched: list[nn.Module] = []
        self.dense: list[tuple[nn.Parameter, torch.dtype]] = []
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear | Embedding):
                self._patch(module, module.weight, matrix(original, name))
            elif isinstance(module, Experts):
                self._patch_experts(name, module, original)
        packed = {
            id(tensor)
            for module in model.modules()
            if isinstance(module, StoredWeight)
            for tensor in module.parameters()
        }
        for parameter in model.parameters():
            if id(parameter) not in packed and parameter.is_floating_point():
                self.dense.append((parameter, parameter.dtype))
                parameter.data = parameter.data.to(torch.float32, copy=True)  # the file may be mapped read-only
                parameter.requires_grad_(True)
        self.groups = self._groups()
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]

    def _patch(self, module: nn.Module, stored: StoredWeight, original: Tensor) -> None:
        self.trained.add(stored, original)
        if isinstance(module, Embedding):
            scale = 1.0 if module.scale is None else module.scale
            module.forward = lambda indices: self.trained.rows(stored, indices) * scale
        else:
            module.forward = lambda x: self.trained.product(stored, x, module._parameters["bias"])  # pyright: ignore
        self.patched.append(module)

    def _patch_experts(self, name: str, module: Experts, original: nn.Module) -> None:
        for kind in ("gate_up_proj", "down_proj"):
            for index, stored in enumerate(getattr(module, kind)):
                self.trained.add(stored, matrix(original, f"{name}.{kind}[{index}]"))
                stored.forward = lambda x, bias=None, stored=stored: self.trained.product(stored, x, bias)
                self.patched.append(stored)

    def _groups(self) -> list[dict[str, Any]]:
        named: dict[str, list[nn.Parameter]] = {name: [] for name in RATES}
        named["dense"] += [parameter for parameter, _ in self.dense]
        for leaf in self.trained.leaves.values():
            for name, parameters in leaf.groups().items():
                named[name] += parameters
        return [{"params": named[name], "lr": rate, "rate": rate} for name, rate in RATES.items() if named[name]]

    def state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)

    @contextmanager
    def rounded(self) -> Generator[None]:
        """Norms, biases and kept matrices as they will be stored, while the context lasts."""
        exact = [parameter.data for parameter, _ in self.dense]
        for parameter, dtype in self.dense:
            parameter.data = parameter.data.to(dtype).float()
        try:
            yield
        finally:
            for (parameter, _), data in zip(self.dense, exact, strict=True):
                parameter.data = data

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits.float()

    def write_back(self) -> None:
        for leaf in self.trained.leaves.values():
            leaf.write_back()

    def release(self) -> None:
        """Give the modules their own forward and the parameters their own types again."""
        for module in self.patched:
            module.__dict__.pop("forward", None)
        for parameter, dtype in self.dense:
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


class _Run:
    """The steps of one healing, and where they stand."""

    def __init__(
        self, patient: _Patient, teacher: Teacher, check: Tensor, targets: Stage, steps: int, stage: Stage
    ) -> None:
        self.patient = patient
        self.teacher = teacher
        self.check = check
        self.targets = targets
        self.steps = steps
        self.stage = stage
        self.step = 0
        self.optimizer = torch.optim.AdamW(patient.groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.curve: list[list[float]] = []
        self.best: list[Tensor] = []

    @property
    def begun(self) -> int:
        """The step from which it goes on."""
        return int(self.stage.read_note("checkpoint")["step"]) if self.stage.has("checkpoint") else 0

    def resume(self) -> None:
        """Go on from the checkpoint, or measure the state before the first step."""
        if not self.stage.has("checkpoint"):
            self._judge()
            return
        tensors = self.stage.read_tensors("checkpoint")
        note = self.stage.read_note("checkpoint")
        self.step, self.curve = int(note["step"]), note["curve"]
        self.patient.load([tensors[f"now/{i:05}"] for i in range(len(self.patient.parameters))])
        self.best = [tensors[f"best/{i:05}"] for i in range(len(self.patient.parameters))]
        for i, parameter in enumerate(self.patient.parameters):
            self.optimizer.state[parameter] = {
                "step": tensors[f"step/{i:05}"],
                "exp_avg": tensors[f"mean/{i:05}"],
                "exp_avg_sq": tensors[f"square/{i:05}"],
            }

    def advance(self, seed: int) -> None:
        """One step; every EVERY steps and at the end the check windows are judged and a checkpoint is written."""
        count = self.teacher.tokens.shape[0]
        order = torch.randperm(count, generator=seeded(seed, "order", self.step * ROWS // count))
        first = self.step * ROWS % count
        rows = order[first : first + ROWS]
        decay = 0.5 * (1.0 + math.cos(math.pi * self.step / self.steps))
        warm = min(1.0, (self.step + 1) / 5)
        damage = min(1.0, math.sqrt(self.curve[0][1] / FULL_RATE_KL))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * damage * warm * (0.05 + 0.95 * decay)
        target = torch.log_softmax(self.teacher.logits(rows), -1)
        loss = _divergence(self.patient.logits(self.teacher.tokens[rows]), target) / target[..., 0].numel()
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"healing diverged at step {self.step}: the loss became {loss.item()}; use --heal 0")
        loss.backward()
        nn.utils.clip_grad_norm_(self.patient.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % EVERY == 0 or self.step == self.steps:
            self._judge()
            self._checkpoint()

    @torch.no_grad()
    def _judge(self) -> None:
        """KL on the check windows; remember the state when it is the best so far."""
        total = 0.0
        with self.patient.rounded():
            for index in range(self.check.shape[0]):
                target = self.targets.read_tensors(f"check-{index:03}")["log_probabilities"].float()
                logits = self.patient.logits(self.check[index : index + 1])[0]
                total += float(_divergence(logits, torch.log_softmax(target, -1)))
        kl = total / self.check.numel()
        if not self.best or kl < min(value for _, value in self.curve):
            self.best = self.patient.state()
        self.curve.append([self.step, kl])

    def _checkpoint(self) -> None:
        tensors: dict[str, Tensor] = {}
        for i, (parameter, best) in enumerate(zip(self.patient.parameters, self.best, strict=True)):
            # Of an expert that no token has reached yet the optimizer keeps nothing.
            state: dict[str, Tensor] = dict(self.optimizer.state.get(parameter, {}))
            tensors[f"now/{i:05}"] = parameter.data
            tensors[f"best/{i:05}"] = best
            tensors[f"step/{i:05}"] = state.get("step", torch.zeros(()))
            tensors[f"mean/{i:05}"] = state.get("exp_avg", torch.zeros_like(parameter))
            tensors[f"square/{i:05}"] = state.get("exp_avg_sq", torch.zeros_like(parameter))
        self.stage.write_tensors("checkpoint", tensors, note={"step": self.step, "curve": self.curve})

    def record(self) -> HealRecord:
        return HealRecord(
            steps=self.steps,
            tokens_per_step=ROWS * self.teacher.tokens.shape[1],
            kl_before=self.curve[0][1],
            kl_after=min(value for _, value in self.curve),
            curve=self.curve,
        )


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Σ KL(target || softmax(logits)) over all positions; target are log-probabilities."""
    return nn.functional.kl_div(torch.log_softmax(logits, -1), target, reduction="sum", log_target=True)
