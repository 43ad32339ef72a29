"""The quantizer and its configuration that Transformers calls for `"quant_method": "parco"`.

`from_pretrained` builds the model on the meta device; here each module that the configuration names is replaced by
one that holds an empty `StoredWeight` of the named spec, and Transformers then loads the tensors by their names.
Importing this module imports Transformers' quantizers, so only `registration` and functions that have a model in hand
do."""

# Transformers' own extension points are names with an underscore, and methods whose base returns None.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from parco import products, weights
from parco.hub.names import keep_ties, resolve
from parco.nn import StoredWeight, pack_, replace_, saved
from parco.nn.shared import put_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT = 64  # bytes; a cache line and an AVX-512 register


def _this_version() -> str:
    return metadata.version("parco")


class ParcoConfig(QuantizationConfigMixin):
    """What config.json says of a model that parco saved.

    weights: module name -> the text of the spec that its matrix is stored in, such as "quantized(int4:32, 1024x4096)".
    tied: module name -> the name in `weights` whose tensors it shares (a head tied to the embedding).
    products: name in `weights` -> how x is multiplied by it, such as "activations(int8)"; native where it is not named.
    shared: path of a factor -> the path of the one that it is: "….k_proj.weight.right" -> "….q_proj.weight.right".
    dtype: in which the model computes, by torch's name; tensors of a weight keep the dtypes of their spec.
    version: of the parco that saved it.
    """

    quant_method: Any = "parco"

    def __init__(
        self,
        weights: dict[str, str],
        tied: dict[str, str] | None = None,
        dtype: str = "float32",
        version: str | None = None,
        quant_method: str = "parco",
        products: dict[str, str] | None = None,
        shared: dict[str, str] | None = None,
    ) -> None:
        if quant_method != "parco":
            raise ValueError(f"quant_method={quant_method!r}: ParcoConfig describes only what parco saved")
        self.quant_method = quant_method
        self.version = version or _this_version()
        self.dtype = dtype
        self.weights = dict(weights)
        self.tied = dict(tied or {})
        self.products = dict(products or {})
        self.shared = _checked(shared or {}, self.weights)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ParcoConfig:
        """The configuration of a model in memory, read off its modules."""
        description = saved.describe(model)
        dtype = str(saved.compute_dtype(model)).removeprefix("torch.")
        products = {name: str(product) for name, product in description.products.items()}
        weights = {name: str(spec) for name, spec in description.weights.items()}
        return cls(weights, description.tied, dtype, products=products, shared=description.shared)

    def specs(self) -> dict[str, weights.Weight]:
        """The parsed specs; ValueError names the module whose text this version of parco does not know."""
        found: dict[str, weights.Weight] = {}
        for name, text in self.weights.items():
            try:
                found[name] = weights.parse(text)
            except ValueError as error:
                raise ValueError(
                    f"weight of {name!r}, saved by parco {self.version}, is not known to parco {_this_version()}:"
                    f" {error}"
                ) from error
        return found


def _checked(shared: Any, weights: dict[str, str]) -> dict[str, str]:
    """`shared`, whose owners are factors of a layer beside the one that shares them, and share no other's. ValueError
    for anything else: another basis would be multiplied by without a word.
    """
    if not isinstance(shared, dict):
        raise ValueError(f"shared={shared!r}: an object of paths is needed; copy or download the configuration again")
    pairs = cast(dict[str, Any], shared)
    for path, owner in pairs.items():
        layers = [str(factor).partition(".weight.")[0] for factor in (path, owner)]
        blocks = {layer.rpartition(".")[0] for layer in layers}
        if not isinstance(owner, str) or owner in pairs or len(blocks) > 1 or not weights.keys() >= set(layers):
            raise ValueError(
                f"shared[{path!r}] is {owner!r}: a factor of its own, of a stored layer in the same block, is needed;"
                " copy or download the configuration again"
            )
    return dict(pairs)


class ParcoQuantizer(HfQuantizer):
    """Puts stored weights in place before loading, and sees that every one of them was loaded."""

    quantization_config: ParcoConfig
    requires_calibration = False

    def __init__(self, quantization_config: ParcoConfig, pre_quantized: bool = True) -> None:
        if not pre_quantized:
            raise ValueError(
                "from_pretrained does not quantize with parco: load the dense model, then call parco.convert_(model,"
                " method) or parco.fit"
            )
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._loaded_names: set[str] = set()

    def update_attn_implementation(self, config: Any) -> Any:
        """The earliest sight of the configuration: puts back the dtype that a save through `save_pretrained` misreads.

        Transformers writes the dtype of the first floating parameter, which may be a scale.
        """
        config.dtype = getattr(torch, self.quantization_config.dtype)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        names = {name: resolve(model, name) for name in config.weights | config.tied}
        tied = {here: names[owner] for name, owner in config.tied.items() if (here := names[name])}
        keep_ties(model, [here for here in names.values() if here], {k: v for k, v in tied.items() if v})
        # Inside from_pretrained every new tensor is on the meta device, even a constant that a module computes.
        with torch.device("cpu"):
            for name, spec in config.specs().items():
                here = names[name]
                if here is not None:
                    stored = StoredWeight.empty(spec, device="meta")
                    stored.product = products.parse(config.products.get(name, "native"))
                    replace_(model, here, stored)
            for here, owner in tied.items():
                if owner is not None:
                    _share(model, here, owner)
            for path, owner in config.shared.items():
                _share_factor(model, path, owner)
        self._loaded_names = {name for name, _ in saved.stored_parameters(model)}
        ignored: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())
        clashing = [*saved.clashing_names(config.weights), saved.HINT]
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(name)}$" for name in clashing}
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, which is no cast, for the tensors of stored weights; else what Transformers chose."""
        if any(target in self._loaded_names for target in getattr(converter, "target_patterns", ())):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        missing: list[str] = []
        for name, parameter in saved.stored_parameters(model):
            if parameter.device.type == "meta":
                continue
            if not getattr(parameter, "_is_hf_initialized", False):
                missing.append(name)
            parameter.requires_grad_(False)
            if parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of stored weights, {missing[0]!r} first: download or save"
                " it again"
            )
        pack_(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """For `save_pretrained`: the tensors with the clashing names, and the configuration as the model is now."""
        self.quantization_config = ParcoConfig.of(model)
        model.config.quantization_config = self.quantization_config
        vars(model)["_weight_conversions"] = []
        return saved.tensors_to_save(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through stored weights, so adapters on them train."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _share(model: PreTrainedModel, name: str, owner: str) -> None:
    """Makes `name` hold the stored weight of `owner`, where the architecture has not declared that already."""
    weight = model.get_submodule(owner).weight
    assert isinstance(weight, StoredWeight)
    if model.get_submodule(name).weight is not weight:
        replace_(model, name, weight)
        leaves = [leaf for leaf, _ in weight.named_parameters()]
        model.all_tied_weights_keys |= {f"{name}.weight.{leaf}": f"{owner}.weight.{leaf}" for leaf in leaves}


def _share_factor(model: PreTrainedModel, path: str, owner: str) -> None:
    """Makes the factor `path` of a stored weight that of `owner`; files hold it under the owner's name. Raises
    ValueError where the two are no factors of one kind."""
    here, there = resolve(model, path), resolve(model, owner)
    if here is None and there is None:  # of a layer that this model does not have
        return
    parts = [None if name is None else model.get_submodule(name) for name in (here, there)]
    mine, theirs = (part.spec if isinstance(part, StoredWeight) else None for part in parts)
    if not isinstance(mine, weights.Shared) or mine != theirs or here is None or there is None:
        raise ValueError(
            f"{path!r} is to be the factor of {owner!r}, and the two are {mine} and {theirs}: the configuration is "
            "damaged; copy or download it again"
        )
    put_(model, here, model.get_submodule(there))
    leaves = [leaf for leaf, _ in model.get_submodule(there).named_parameters()]
    model.all_tied_weights_keys |= {f"{here}.{leaf}": f"{there}.{leaf}" for leaf in leaves}
