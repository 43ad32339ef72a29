"""Transformers' Trainer, and what it lacks for training in few bits.

On a CPU Accelerate drops the loss scaler of fp16 and turns FSDP into DDP, both quietly; here autocast, the scaler, DDP
and FSDP2 are torch's own. Checkpoints are whole or absent, hold nothing but tensors and numbers, and one that many
ranks wrote is read by any other number. Numbers that are not finite stop the run and name their layer.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import rotate_checkpoints

from parco.hub.save import flush, put_in_place
from parco.nn import blocks
from parco.trainer import disk
from parco.trainer.watching import Watching
from parco.training import AdamW, delayed_scales, once_per_step
from parco.training.optimizer import States

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
LEAST_SCALE = 2.0**-14
"""A loss scale below which fp16 cannot help: every step of the last dozens was skipped."""


class Trainer(transformers.Trainer):
    """As `transformers.Trainer`, whose arguments it takes, with `precision`, the dtype of autocast (None: none), and
    `shard`: FSDP2 instead of DDP where there are several ranks. Where no `optimizers` are given it is
    `parco.training.AdamW` with `states`, clipping within its pass. `watching` takes part in steps and checkpoints.

    fp16 has a loss scaler. Raises ValueError where `args` asks Transformers for a precision or sharding of its own, and
    FloatingPointError for a loss or gradient that is not finite, naming the step, the batch's windows and the layer.
    """

    model: Any
    args: Any
    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: transformers.TrainingArguments,
        *,
        precision: torch.dtype | None = torch.bfloat16,
        shard: bool = False,
        states: States = "fp32",
        watching: Watching | None = None,
        **named: Any,
    ) -> None:
        if args.bf16 or args.fp16 or args.fsdp:
            raise ValueError("args: bf16, fp16 and fsdp are not for TrainingArguments here: give precision= and shard=")
        args.logging_nan_inf_filter = False
        self.precision = precision
        self.states: States = states
        self.scaler: Any = None
        self.skipped = 0
        self.watching = watching
        self._scale = 0.0
        if shard and args.world_size > 1:
            for _, block in blocks(model):
                fully_shard(block)
            fully_shard(model)
        super().__init__(model, args, **named)

    @property
    def sharded(self) -> bool:
        """Whether the model's parameters are spread over the ranks."""
        return isinstance(self.model, FSDPModule)

    def describe(self) -> str:
        """What runs: devices, ranks, precision, in words."""
        ranks = self.args.world_size
        way = f"{ranks} ranks, {'FSDP2' if self.sharded else 'DDP'}" if ranks > 1 else "one process"
        scaled = ", dynamic loss scale" if self.scaler is not None else ""
        between = "no autocast" if self.precision is None else f"{str(self.precision)[6:]} between the layers"
        return f"{self.args.device.type}, {way}, {torch.get_num_threads()} threads, {between}{scaled}"

    # What Accelerate would do, done here.

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)  # it wraps nothing
        if self.precision == torch.float16:
            kind = self.args.device.type
            scaler = ShardedGradScaler if self.args.world_size > 1 else torch.amp.GradScaler
            self.scaler = self.accelerator.scaler = scaler(kind, init_scale=2.0**16, growth_interval=2000)
            self._scale = self.scaler.get_scale()

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in trained if name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
            ]
            self.optimizer = AdamW(
                [group for group in groups if group["params"]],
                self.args.learning_rate,
                (self.args.adam_beta1, self.args.adam_beta2),
                self.args.adam_epsilon,
                states=self.states,
                seed=self.args.seed,
            )
        return self.optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if not training or self.args.world_size == 1 or self.sharded or isinstance(model, DistributedDataParallel):
            return model
        device = self.args.device
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, self.precision, cache_enabled=cache_enabled)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # what judges is all of it
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def train(self, *arguments: Any, **named: Any) -> Any:
        several = self.args.gradient_accumulation_steps > 1 or self.args.gradient_checkpointing
        with once_per_step() if several else contextlib.nullcontext():
            return super().train(*arguments, **named)

    # Numbers that are not finite.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        is_finite = math.isfinite(loss.item())
        if not all(self._of_all_ranks(is_finite)):
            with torch.no_grad(), self.compute_loss_context_manager():
                layer = first_not_finite(self.model, lambda: self.compute_loss(model, self._prepare_inputs(inputs)))
            said = "" if is_finite else f"{self._place(inputs)}: the loss is {loss.item()}, first in {layer}"
            raise FloatingPointError(next(filter(None, self._of_all_ranks(said))))
        self._last = inputs
        return loss

    def _of_all_ranks(self, value: Any) -> list[Any]:
        """The values that the ranks give, of which all have to ask."""
        values = [value] * self.args.world_size
        if self.args.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **named: Any) -> Any:
        inputs = {name: tensor for name, tensor in inputs.items() if name != "window"}
        return super().compute_loss(model, inputs, *arguments, **named)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self.args.world_size > 1:
            for tensor in delayed_scales(self.model):
                dist.all_reduce(tensor, dist.ReduceOp.MAX)
        if self.scaler is not None:
            self.scaler.unscale_(self._plain_optimizer)
        if self.watching is not None:
            self.watching.step()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.scaler is None and not math.isfinite(norm.item()):
            names = [n for n, p in self.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
            # The backward pass came to the last of them first.
            place = f"in {names[-1]}" if names else "its squares are beyond fp32: a smaller --lr may help"
            raise FloatingPointError(f"{self._place(self._last)}: the gradient's norm is {norm.item()}, {place}")
        if self.args.max_grad_norm > 0:
            times = norm.item() / self.args.max_grad_norm
            if self.scaler is None and isinstance(self._plain_optimizer, AdamW):
                vars(self._plain_optimizer)["grad_scale"] = max(times, 1.0)  # the optimizer's own pass divides by it
            elif times > 1:
                nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _place(self, inputs: Any) -> str:
        numbers = inputs["window"].tolist() if "window" in inputs else []
        rows = f", windows {', '.join(map(str, numbers))} of the data" if numbers else ""
        return f"step {self.state.global_step + 1}, batch {self.state.global_step}{rows}"

    @property
    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def check_scale(self) -> bool:
        """Whether the step that ends was skipped, which a fused optimizer does by itself: then the scale went down.
        Raises FloatingPointError once it is so small that no scale helps.
        """
        if self.scaler is None:
            return False
        before, self._scale = self._scale, self.scaler.get_scale()
        if self._scale >= before:
            return False
        self.skipped += 1
        if self._scale < LEAST_SCALE:
            raise FloatingPointError(
                f"{self._place(self._last)}: the gradient is not finite at any loss scale; bf16 has fp32's range"
            )
        return True

    # Checkpoints.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        partial = final.with_name(f".{final.name}.partial")
        with disk.explained(final):
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.meet()
            try:
                with self._output_dir(partial):
                    super()._save_checkpoint(model, trial)
                self.meet()
                if self.args.should_save:
                    flush(partial / final.name)
                    put_in_place(partial / final.name, final)
            finally:
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
            if self.args.should_save:
                rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=self.args.save_total_limit)
            self.meet()

    @contextlib.contextmanager
    def _output_dir(self, folder: Path) -> Generator[None]:
        before, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = before

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = get_model_state_dict(self.model, options=_FULL if self.sharded else None)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            # A checkpoint has the model's own names, the model those that its family is published under.
            self.model.save_pretrained(folder, state_dict=state, save_original_format=not _internal_call)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.watching is not None and self.args.should_save:
            self.watching.save(Path(output_dir) / "watch.json")
        state = get_optimizer_state_dict(self.model, self._plain_optimizer, options=_FULL)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.watching is not None:
            with disk.read(folder / "watch.json") as file:
                self.watching.load(file)
        state: dict[str, Any] = {}
        for each in sorted(folder.glob("*.safetensors")):
            with disk.read(each) as file:
                state |= load_file(file)
        set_model_state_dict(self.model, state | self._tied(state), options=_SPREAD)

    def _tied(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a file keeps under one of its names only: the other names of tensors in `state`."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        found: dict[str, Any] = {}
        for same in names.values():
            kept = [name for name in same if name in state]
            found |= {name: state[kept[0]] for name in same if kept and name not in state}
        return found

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.scaler is None:
            return
        with disk.read(Path(checkpoint) / "scaler.pt") as file:
            self.scaler.load_state_dict(torch.load(file, weights_only=True))
        self._scale = self.scaler.get_scale()
        self.skipped = max([0, *(int(entry.get("skipped", 0)) for entry in self.state.log_history)])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        with disk.read(Path(checkpoint) / name):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with disk.read(Path(checkpoint) / "optimizer.pt") as file:
            state = torch.load(file, weights_only=True)
        set_optimizer_state_dict(self.model, self._plain_optimizer, state, options=_SPREAD)
        with disk.read(Path(checkpoint) / "scheduler.pt") as file:
            self.lr_scheduler.load_state_dict(torch.load(file, weights_only=True))

    def meet(self) -> None:
        """Waits until every rank is here."""
        if self.args.world_size > 1:
            dist.barrier()


def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str:
    """The name and class of the innermost module that first gives a number that is not finite while `run` runs."""
    found: list[str] = []

    def look(name: str, module: nn.Module, _: Any, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        bad = any(isinstance(t, Tensor) and t.is_floating_point() and not _is_finite(t) for t in tensors)
        if bad and not found:
            found.append(f"{name} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(functools.partial(look, name)) for name, module in model.named_modules() if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
