"""Puts the fused loss into Transformers' causal language models: logits are never whole while a model trains.

The model's forward stays its own. While it runs, the head answers with pending logits: they remember what they would be
made of, take part in the scaling and the cap that some models put between head and loss, and are handed to the model's
loss function, which computes the loss from them. So nothing is known here of single architectures.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional

from parco.kernels.loss import linear_cross_entropy
from parco.nn import head_name
from parco.nn.linear import carries_adapters, kind_of, under_its_name
from parco.training.recipe import Operand, Recipe

LOSS = "ForCausalLMLoss"
"""Transformers' loss of causal language models, which is the one that is fused."""


def fuse_loss_(model: nn.Module, *, evaluation: bool = False) -> nn.Module:
    """Makes `model(input_ids, labels=labels)` of a causal language model of Transformers compute its loss without its
    logits, in place, while it trains (`model.train()`, gradients on), and with `evaluation` always; returns the model.

    Its output then has the loss, and None for logits; everything else is as it was: calls without labels, names,
    parameters and state dict. The loss is Transformers' (labels shifted, -100 ignored, `num_items_in_batch`),
    the products are those of `linear_cross_entropy`, under the head's recipe where it was prepared.

    Raises TypeError where `model` is no module, ValueError where its forward has no head or no such loss, was replaced,
    or where the head is prepared under a recipe of fewer than 16 bits, holds a stored weight, carries adapters or is
    sharded by itself.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(model, _FusedLoss):
        _require(model)
        model.__class__ = _class_of(type(model))
    vars(model)["_fused_in_evaluation"] = evaluation
    return model


def _require(model: Any) -> None:
    kind = type(model).__name__
    name = head_name(model)
    if name is None:
        raise ValueError(f"fuse_loss_: {kind} has no output head")
    if "forward" in model.__dict__:
        raise ValueError(f"fuse_loss_: the forward of this {kind} has been replaced; fuse the loss before")
    code = inspect.unwrap(type(model).forward).__code__
    if "loss_function" not in code.co_names or name.split(".")[0] not in code.co_names:
        raise ValueError(
            f"fuse_loss_: the forward of {kind} does not hand what {name} gives to its loss_function, as causal "
            "language models of Transformers do"
        )
    loss: Any = model.loss_function
    if getattr(loss, "__name__", None) != LOSS:
        raise ValueError(f"fuse_loss_: {kind} has the loss {getattr(loss, '__name__', loss)}; {LOSS} is fused")
    _multiplied(model.get_submodule(name), name)


def _multiplied(head: Any, name: str) -> torch.dtype | None:
    """The dtype of the operands of a head's products: its recipe's, or None where autocast and its input say."""
    if isinstance(head, FSDPModule):  # which gives the weight back when the head's forward is over
        raise ValueError(
            f"fuse_loss_: the head {name} is sharded by itself; leave it to fully_shard of the whole model"
        )
    if kind_of(head) is not nn.Linear:
        raise ValueError(f"fuse_loss_: the head {name} is a {type(head).__name__}; nn.Linear is needed")
    if "forward" in head.__dict__:
        raise ValueError(f"fuse_loss_: the forward of the head {name} has been replaced")
    if carries_adapters(head):
        raise ValueError(f"fuse_loss_: the head {name} carries adapters, which the fused loss would pass by")
    recipe: Recipe | None = head.__dict__.get("_recipe")
    if recipe is None:
        return None
    written = {operand for pair in (recipe.output, recipe.grad_input, recipe.grad_weight) for operand in pair}
    (first, *others) = written
    dtype = first.format.dtype
    if others or dtype is None or first != Operand(first.format):
        raise ValueError(
            f"fuse_loss_: the head {name} is prepared under {recipe}; the fused loss has all operands in one of fp32, "
            "bf16 and fp16: prepare_ without filter_fn leaves the head in bf16"
        )
    return dtype


class _FusedLoss:
    """Of every model whose loss is fused: the class that it had."""

    _original: type[nn.Module]


@functools.cache
def _class_of(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` that trains without logits."""
    whole: Any = original

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        fused = self._fused_in_evaluation or (self.training and torch.is_grad_enabled())
        if not (fused and _has_labels(whole, self, inputs, named)):
            return whole.forward(self, *inputs, **named)
        name = head_name(self)
        assert name is not None
        head: Any = self.get_submodule(name)
        dtype = _multiplied(head, name)
        head.__dict__["forward"] = functools.partial(PendingLogits, head, dtype)
        try:
            output = whole.forward(self, *inputs, **named)
        finally:
            del head.__dict__["forward"]
        return _without_logits(output)

    def loss_function(self: Any) -> Any:
        return functools.partial(_loss, whole.loss_function.fget(self))

    def set_loss_function(self: Any, value: Any) -> None:
        whole.loss_function.fset(self, value)

    def reduce(self: Any, protocol: int) -> Any:
        return _revived, (original,), self.__dict__

    functools.update_wrapper(forward, whole.forward)  # Trainer asks the forward for the names of its arguments
    members: dict[str, object] = {
        "__reduce_ex__": reduce,
        "forward": forward,
        "loss_function": property(loss_function, set_loss_function),
    }
    return under_its_name(original, (_FusedLoss, original), members)


def _revived(original: type[nn.Module]) -> nn.Module:
    """An empty model whose loss is fused, which unpickling and copying fill."""
    fused = _class_of(original)
    return fused.__new__(fused)


def _has_labels(original: Any, model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    given = named if not inputs else _signature(original).bind_partial(model, *inputs, **named).arguments
    return given.get("labels") is not None


@functools.cache
def _signature(original: Any) -> inspect.Signature:
    return inspect.signature(original.forward)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if isinstance(each, PendingLogits) else each for each in output)
    return type(output)(**{name: each for name, each in output.items() if not isinstance(each, PendingLogits)})


def _loss(
    original: Callable[..., Tensor],
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Transformers' loss of causal language models, of pending logits too."""
    if not isinstance(logits, PendingLogits):
        return original(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **others
        )
    if shift_labels is None:
        assert labels is not None
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return logits.cross_entropy(shift_labels, ignore_index, num_items_in_batch)


class PendingLogits:
    """Logits that are not computed: those of `head` of x, times `factor`, and capped where `softcap` is not None.

    Takes division and multiplication by numbers, `torch.tanh` and casts, as models have them between head and loss.
    Raises NotImplementedError for all else, naming it.
    """

    def __init__(self, head: nn.Linear, dtype: torch.dtype | None, x: Tensor) -> None:
        self.head, self.dtype, self.x = head, dtype, x
        self.factor, self.softcap = 1.0, None
        self.is_bounded = False

    def _with(self, **changes: Any) -> PendingLogits:
        other = object.__new__(PendingLogits)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def __mul__(self, factor: Any) -> PendingLogits:
        if not isinstance(factor, int | float):
            return NotImplemented
        if not self.is_bounded:
            return self._with(factor=self.factor * factor)
        if self.softcap is not None or not factor > 0:
            raise NotImplementedError("the fused loss knows logits scaled, then capped, and nothing after that")
        return self._with(softcap=float(factor), factor=self.factor * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> PendingLogits:
        return self * (1 / divisor) if isinstance(divisor, int | float) else NotImplemented

    def _same(self, *_: Any, **__: Any) -> PendingLogits:
        return self

    float = contiguous = to = _same

    def tanh(self) -> PendingLogits:
        if self.is_bounded:
            raise NotImplementedError("the fused loss knows logits capped once")
        return self._with(is_bounded=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tanh:
            return args[0].tanh()
        name = getattr(func, "__name__", func)
        raise NotImplementedError(f"the fused loss has no logits, and the model applies {name} to them")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"the fused loss has no logits, and the model asks for their {name!r}")

    def cross_entropy(self, labels: Tensor, ignore_index: int, divisor: Tensor | float | None) -> Tensor:
        """The mean cross entropy with labels [...], or its sum over `divisor`."""
        weight = self.head.weight
        if isinstance(weight, DTensor):
            raise ValueError("the fused loss needs the head's whole weight, which is spread over ranks as a DTensor")
        softcap = self.softcap
        if self.is_bounded and softcap is None:  # tanh without a factor after it
            softcap = 1.0
        # With a cap c the logits are c · tanh(factor · z / c): the factor before it times c is that of z.
        x, bias = self.x, cast("Tensor | None", self.head.bias)
        if abs(self.factor - 1) > 1e-12:
            x, bias = x * self.factor, None if bias is None else bias * self.factor
        return linear_cross_entropy(
            x,
            weight,
            labels.to(x.device),
            bias,
            ignore_index=ignore_index,
            softcap=softcap,
            divisor=divisor,
            dtype=self.dtype,
        )
