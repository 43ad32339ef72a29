"""Watching a run: what the formats of a prepared model lose, layer by layer, every so many steps.

>>> import torch, parco.training
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
>>> prepared = parco.training.prepare_(model, "mxfp8")
>>> watch = parco.training.Watch(model, every=50)
>>> model(torch.randn(32, 64)).square().sum().backward()
>>> readings = watch.step()
>>> len(readings.operands), sorted(readings.grad_norms), watch.step()
(10, ['0', '2'], None)

The first layer's input has no gradient here, so there is one product less.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parco.training.readings import PLACES, SUMS, Probe, Reading, Readings, Sums
from parco.training.recipe import FACTORS, Recipe

KEPT = 32


class Watch:
    """Readings of a prepared model's operands on its first step and every `every` steps from there.

    Call `step` once for each step of the optimizer, after all of its backward passes and before the gradients are
    cleared (for `grad_norms` before they are clipped, but unscaled, if those are to be the run's own). Readings are of
    all micro-batches of a step together; forwards in evaluation without gradients are not among them. `model` is the
    one that was prepared, not its wrapper.

    With a process `group` (`torch.distributed.group.WORLD`) the readings are of all its ranks' tokens together, and
    each of its ranks calls `step` as often; without one each rank has its own. `history` keeps the last 32 readings.
    A copy of a watched model is not watched.

    Raises ValueError where no layer of `model` is prepared, for `every` < 1, and for a model that is watched already.
    """

    def __init__(self, model: torch.nn.Module, every: int = 50, *, group: dist.ProcessGroup | None = None) -> None:
        if every < 1:
            raise ValueError(f"every={every}: is a number of steps, at least 1")
        self.layers = prepared_layers(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no prepared layer: call parco.training.prepare_ first")
        watched = [name for name, layer in self.layers.items() if _probe(layer).sums is not None]
        if watched:
            raise ValueError(f"layer {watched[0]} is watched already: close() the other Watch")
        self.every, self.group = every, group
        self.steps = 0
        self.history: list[Readings] = []
        self._look()

    def step(self) -> Readings | None:
        """Ends a step of the optimizer: its readings if it was watched, else None."""
        found = self._read() if self.is_watching else None
        self.steps += 1
        self._look()
        if found is not None:
            self.history = [*self.history, found][-KEPT:]
        return found

    @property
    def is_watching(self) -> bool:
        """Whether the step that runs now is watched."""
        return any(_probe(layer).sums is not None for layer in self.layers.values())

    def close(self) -> None:
        """Ends watching; another Watch can begin. `step` returns None from here on."""
        for layer in self.layers.values():
            _probe(layer).sums = None
        self.layers = {}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the history, in plain numbers and texts: to be saved between two steps."""
        return {"steps": self.steps, "history": [dataclasses.asdict(each) for each in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: the same steps are watched. KeyError for what is no such state."""
        self.steps = state["steps"]
        self.history = [
            Readings(each["step"], tuple(Reading(**one) for one in each["operands"]), dict(each["grad_norms"]))
            for each in state["history"]
        ]
        self._look()

    def _look(self) -> None:
        wanted = self.steps % self.every == 0
        for layer in self.layers.values():
            _probe(layer).sums = Sums() if wanted else None

    def _read(self) -> Readings:
        sums, amax = self._gathered()
        operands: list[Reading] = []
        for row, (name, layer) in enumerate(self.layers.items()):
            recipe: Recipe = layer._recipe
            for place, (product, role) in enumerate(PLACES):
                operand = (*recipe.pair(product),)[FACTORS[product].index(role)]
                squares, errors, numbers, nonzero, lost, beyond = sums[row][place]
                if not numbers:
                    continue
                operands.append(
                    Reading(
                        name,
                        product,
                        role,
                        str(operand),
                        _decibels(squares, errors),
                        lost / nonzero if nonzero else 0.0,
                        beyond / numbers,
                        amax[row][place],
                    )
                )
        return Readings(self.steps + 1, tuple(operands), self._grad_norms())

    def _gathered(self) -> tuple[list[list[list[float]]], list[list[float]]]:
        """The sums of all layers' places, and amax, over all ranks: in one transfer from the device."""
        sums, amax = [], []
        for layer in self.layers.values():
            device, own = layer.weight.device, _probe(layer).sums
            assert own is not None
            recipe: Recipe = layer._recipe
            for product, role in PLACES:
                place = (product, role)
                pair = recipe.pair(product)
                if pair.right.reused and role == FACTORS[product][1] and (product, FACTORS[product][0]) in own.sums:
                    place = ("output", role)
                sums.append(own.sums.get(place, torch.zeros(SUMS, dtype=torch.float64, device=device)))
                amax.append(own.amax.get(place, torch.zeros((), dtype=torch.float64, device=device)))
        shape = (len(self.layers), len(PLACES))
        total, greatest = torch.stack(_on_one(sums)), torch.stack(_on_one(amax))
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
            dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.group)
        return total.reshape(*shape, SUMS).tolist(), greatest.reshape(shape).tolist()

    def _grad_norms(self) -> dict[str, float]:
        norms: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            grad: Tensor | None = layer.weight.grad
            if grad is not None:
                norm: Any = torch.linalg.vector_norm(grad, dtype=torch.float32)
                norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded by FSDP2
        values = torch.stack(_on_one(list(norms.values()))).tolist() if norms else []
        return dict(zip(norms, values, strict=True))


def prepared_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers of `model` that follow a recipe, by name."""
    return {name: module for name, module in model.named_modules() if "_probe" in module.__dict__}


def _probe(layer: Any) -> Probe:
    return layer._probe  # type: ignore[no-any-return]


def _on_one(tensors: list[Tensor]) -> list[Tensor]:
    """All on the device of the first: the layers of a model may lie on several."""
    return [each.to(tensors[0].device) for each in tensors]


def _decibels(squares: float, errors: float) -> float:
    """10 log10(squares / errors)."""
    if errors == 0:
        return math.inf
    ratio = squares / errors
    return 10 * math.log10(ratio) if ratio > 0 else (-math.inf if ratio == 0 else math.nan)
