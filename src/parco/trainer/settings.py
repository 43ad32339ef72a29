"""What `parco train` and `parco tune` are told alike, and what Transformers' Trainer is told of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from parco.training import RECIPES, Recipe
from parco.training.optimizer import STATES, States


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The numbers of a run's steps. `batch` counts windows of `seq` tokens per optimizer step, over all ranks and
    `accumulate` passes each.
    """

    recipe: str = "bf16"
    held: str | None = None
    tokenizer: str | None = None
    batch: int = 8
    accumulate: int = 1
    seq: int = 512
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    states: States = "fp32"
    seed: int = 0
    eval_every: int | None = None
    save_every: int | None = None

    def check(self, steps: int | None) -> None:
        """Raises ValueError for a number that makes no sense, naming its option."""
        Recipe.parse(self.recipe)
        numbers = {"steps": steps} | {
            name: getattr(self, name) for name in ("batch", "accumulate", "seq", "eval_every", "save_every")
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} makes no sense: it must be at least 1")
        if self.states not in STATES:
            raise ValueError(f"--states {self.states} is none of {', '.join(STATES)}")
        for name, value, most in (("warmup", self.warmup, steps), ("seed", self.seed, 2**32 - 1)):
            if value is not None and not 0 <= value <= (math.inf if most is None else most):
                raise ValueError(f"--{name} {value} makes no sense: it must lie between 0 and {most or 'the steps'}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay {self.weight_decay:g} makes no sense: it must be a number of at least 0")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr:g} makes no sense: it must be a positive number")
        if self.batch % self.accumulate:
            raise ValueError(f"--batch {self.batch} cannot be passed in --accumulate {self.accumulate} equal parts")

    def to_json(self) -> dict[str, Any]:
        """As settings.json and result.json hold it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that need not be given."""
        fields = dataclasses.fields(cls)
        return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}

    @property
    def precision(self) -> torch.dtype:
        """What autocast gives the operations between the layers."""
        return torch.float16 if Recipe.parse(self.recipe) == RECIPES["fp16"] else torch.bfloat16


def check_libraries() -> None:
    """Raises ValueError where a library that training needs is missing."""
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"training needs {' and '.join(missing)}: pip install 'parco[train]'")


def arguments(
    settings: Schedule, steps: int, rate: float, out: Path, ranks: int = 1, **more: Any
) -> transformers.TrainingArguments:
    """For `steps` steps whose greatest learning rate is `rate` where the settings name none."""
    every = settings.eval_every or max(1, steps // 10)
    rows = settings.batch // (ranks * settings.accumulate)
    return transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or rate,
        warmup_steps=max(1, steps // 50) if settings.warmup is None else settings.warmup,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=settings.save_every or every,
        save_total_limit=2,
        logging_steps=max(1, steps // 100),
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if ranks > 1 and not torch.cuda.is_available() else None,
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )
