"""A saved model's names beside those of the model it is loaded into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from parco.nn.saved import EXPERT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve(model: PreTrainedModel, name: str) -> str | None:
    """`name` as `model` has it: itself, or without or with the prefix of the base model, or None if the model has no
    such module."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        expert = EXPERT.fullmatch(candidate)
        path = expert[1].rpartition(".")[0] if expert else candidate
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return candidate
    return None


def keep_ties(model: PreTrainedModel, weights: Iterable[str], tied: dict[str, str]) -> None:
    """Drops from Transformers' records each pair of parameters that the architecture ties and the saved model does not.

    Such a pair has a stored weight on a side and no entry in `tied` (a checkpoint may hold an embedding and a head
    that differ although its configuration says that they are one). `nn.replace_` and loading then leave the two
    apart."""
    names = {*weights, *tied}

    def kept(target: str, source: str) -> bool:
        first, second = target.removesuffix(".weight"), source.removesuffix(".weight")
        is_stored = first in names or second in names
        return not is_stored or tied.get(first) == second or tied.get(second) == first

    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        pairs: dict[str, str] = getattr(model, attribute, None) or {}
        setattr(model, attribute, {target: source for target, source in pairs.items() if kept(target, source)})
