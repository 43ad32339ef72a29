"""Claim: a whole training step by `nvfp4` on a CPU takes less than a fifth, by `mxfp8` or `fp8-current` less than half
of the time that it takes with torchao's or microxcaling's emulation of the same formats in the same model, under
PyTorch's bf16 autocast. A fifth of torchao's by `mxfp8` or `fp8-current` cannot be had without AMX: the products alone
take longer at fp32's peak; those of nvfp4 run on avx512_vbmi's products of bytes.

    python benchmarks/whole_steps_beside_emulations.py [--threads N] [--rounds R] [--layers L] [--recipes NAME ...]

Interleaved in one process: forward, backward, clipping and AdamW of a model of a Llama's shape (109 M parameters, 8
sequences of 512), every linear layer but the head under the recipe; ours with the fused loss, norms, gates, attention
and AdamW of `parco train`, theirs with Transformers' and PyTorch's. microxcaling is measured where `mx` of its
repository (github.com/microsoft/microxcaling) can be imported; it has MX formats only. All models share their weights.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from interleaved import interleave, ratio, save, spread
from recipes_beat_emulations import EmulatedNVFP4
from recipes_train_beside_autocast import SIZES
from torch import Tensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transformers import LlamaConfig, LlamaForCausalLM
from whole_steps_by_recipe import step, twin

import parco
from parco.training import RECIPES, AdamW, fuse_loss_, prepare_

HEAD = "lm_head"


class Emulated(torch.nn.Module):
    """A linear layer without bias whose product `multiply(x, weight)` is somebody's, on bf16 as autocast would have
    it.
    """

    def __init__(self, weight: torch.nn.Parameter, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.multiply = weight, multiply

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            flat = x.flatten(0, -2).to(torch.bfloat16)
            return self.multiply(flat, self.weight.to(torch.bfloat16)).unflatten(0, x.shape[:-1])


def replaced(model: torch.nn.Module, multiply: Callable[[Tensor, Tensor], Tensor]) -> torch.nn.Module:
    """`model` with that product in every linear layer but the head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != HEAD:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Emulated(module.weight, multiply))
    return model


def microxcaling_mxfp8() -> Callable[[Tensor, Tensor], Tensor]:
    """microxcaling's product in mxfp8, without its further rounding of everything to bf16, which ours does not have."""
    mx = importlib.import_module("mx")
    formats = {"w_elem_format": "fp8_e4m3", "a_elem_format": "fp8_e4m3"}
    specs = mx.finalize_mx_specs({**formats, "scale_bits": 8, "block_size": 32, "custom_cuda": False})
    return lambda x, weight: mx.linear(x, weight, mx_specs=specs)


def torchao_mxfp8(x: Tensor, weight: Tensor) -> Tensor:
    """torchao's product in mxfp8."""
    return _to_mxfp8_then_scaled_mm(x, weight, KernelPreference.EMULATED, ScaleCalculationMode.RCEIL)


def emulations(plain: torch.nn.Module, recipes: list[str]) -> dict[tuple[str, str], torch.nn.Module]:
    """Twins of the model by (recipe, library)."""
    products: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
        ("mxfp8", "torchao"): torchao_mxfp8,
        ("nvfp4", "torchao"): EmulatedNVFP4.apply,
    }
    if importlib.util.find_spec("mx") is not None:
        products["mxfp8", "microxcaling"] = microxcaling_mxfp8()
    found = {key: replaced(twin(plain), product) for key, product in products.items() if key[0] in recipes}
    if "fp8-current" in recipes:
        found["fp8-current", "torchao"] = convert_to_float8_training(
            twin(plain), config=Float8LinearConfig(emulate=True), module_filter_fn=lambda _, name: name != HEAD
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", default=["mxfp8", "fp8-current", "nvfp4"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=options.layers, vocab_size=options.vocabulary, tie_word_embeddings=True, **SIZES
    )
    plain = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, options.vocabulary, (options.sequences, options.length))
    models: dict[tuple[str, str], torch.nn.Module] = emulations(plain, options.recipes)
    for name in options.recipes:
        models[name, "parco"] = twin(plain)
        prepare_(models[name, "parco"], RECIPES[name].with_(ends=0))
        parco.fuse_(models[name, "parco"])
        fuse_loss_(models[name, "parco"])
    theirs = torch.optim.AdamW(plain.parameters(), 1e-4, fused=True)
    ours = AdamW(plain.parameters(), 1e-4)
    runs: dict[str, Callable[[], None]] = {
        " ".join(key): partial(step, model, ours if key[1] == "parco" else theirs, tokens)
        for key, model in models.items()
    }
    seconds = interleave(runs, options.rounds, warm=options.warm)
    rows: list[dict[str, object]] = []
    for recipe, library in models:
        taken = seconds[f"{recipe} {library}"]
        own = {"recipe": recipe, "library": library, "layers": options.layers, "tokens": tokens.numel()}
        own |= {"rounds": options.rounds} | spread(taken)
        rows.append(own | {"times_parco": ratio(taken, seconds[f"{recipe} parco"])})
    save(__file__, rows)


if __name__ == "__main__":
    main()
