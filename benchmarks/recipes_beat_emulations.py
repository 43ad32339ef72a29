"""Claim: a linear layer trained by a recipe on a CPU takes less time than torchao's emulation of the same formats
there: forward and backward, interleaved. Without AMX most of our time is that of the three products in fp32.

    python benchmarks/recipes_beat_emulations.py [--threads N] [--rounds R] [--tokens T]

mxfp8 is torchao's training function with emulated products, fp8-current its Float8Linear with `emulate=True`. Of NVFP4
it has no training on CPUs: each of the three products multiplies `NVFP4Tensor`s that were cast and widened again,
without transform and stochastic rounding, which ours does besides.
"""

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from interleaved import interleave, ratio, save, spread
from torch import Tensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from parco.training import RECIPES, prepare_

SHAPES = ((768, 768), (768, 2048), (2048, 2048))


def nvfp4(x: Tensor) -> Tensor:
    """`x` cast to NVFP4 along its rows, and widened again."""
    scale = per_tensor_amax_to_scale(x.abs().amax())
    return NVFP4Tensor.to_nvfp4(x.contiguous(), per_tensor_scale=scale).dequantize(x.dtype)


class EmulatedNVFP4(torch.autograd.Function):
    """The three products, each operand cast along the dimension that is summed over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nvfp4(x) @ nvfp4(weight).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        return nvfp4(grad) @ nvfp4(weight.T).T, nvfp4(grad.T) @ nvfp4(x.T).T


def emulations(layer: torch.nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    """torchao's way of each recipe."""
    fp8 = convert_to_float8_training(torch.nn.Sequential(copy.deepcopy(layer)), config=Float8LinearConfig(emulate=True))
    weight = torch.nn.Parameter(layer.weight.detach().clone())
    rceil = ScaleCalculationMode.RCEIL
    return {
        "mxfp8": lambda x: _to_mxfp8_then_scaled_mm(x, weight, KernelPreference.EMULATED, rceil),
        "fp8-current": fp8,
        "nvfp4": lambda x: EmulatedNVFP4.apply(x, weight),
    }


def step(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    """Forward and backward."""
    run(x.detach().requires_grad_()).backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for columns, outputs in SHAPES:
        x, grad = (torch.randn(options.tokens, size).to(torch.bfloat16) for size in (columns, outputs))
        plain = torch.nn.Linear(columns, outputs, bias=False, dtype=torch.bfloat16)
        for name, emulation in emulations(plain).items():
            layer = torch.nn.Linear(columns, outputs, bias=False, dtype=torch.bfloat16)
            prepare_(torch.nn.Sequential(layer), RECIPES[name].with_(ends=0))
            runs = {"torchao": emulation, "parco": layer}
            steps = {who: functools.partial(step, run, x, grad) for who, run in runs.items()}
            seconds = interleave(steps, options.rounds)
            rows.append(
                {"recipe": name, "shape": f"{options.tokens}x{columns}x{outputs}"}
                | spread(seconds["parco"])
                | {"torchao_median_us": spread(seconds["torchao"])["median_us"]}
                | {"times_torchao": ratio(seconds["torchao"], seconds["parco"])}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
