"""Claim: a step of AdamW with fp32 states moves its bytes as fast as a plain copy does: parameter, gradient and both
moments, read once, and all but the gradient written once. With 8-bit states it is bound by arithmetic, and takes less
than a tenth of the time of torchao's. PyTorch's foreach and fused AdamW run in the same rounds.

    python benchmarks/adamw_updates_at_memory_speed.py [--threads N] [--rounds R]

`of_copy` is bytes read and written per second over those of a plain copy of a matrix in the same rounds, `of_read` over
those of a plain read of it. The parameters are those of a Llama-shaped model with two layers, the
small ones among them; torchao compiles its step with torch.compile in the rounds that are not counted.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from interleaved import interleave, ratio, save, spread

from parco import _C, machine
from parco.training import AdamW

COPY, READ = "copy", "read"
LAYER = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)] + [(768,)] * 2
SHAPES = {"large": [(16000, 768), *LAYER, *LAYER, (768,)], "small": [(768,), (64, 8)] * 100}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def contenders(dtype: torch.dtype, has_torchao: bool) -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    made: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "ours": lambda p: AdamW(p),
        "ours, 8 bits": lambda p: AdamW(p, states="8bit"),
        "torch foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch fused": lambda p: torch.optim.AdamW(p, fused=True),
    }
    if dtype == torch.bfloat16:
        made |= {"ours, nearest": lambda p: AdamW(p, rounding="nearest")}
    if has_torchao:
        from torchao.optim import AdamW8bit

        made["torchao 8 bits"] = lambda p: AdamW8bit(p, bf16_stochastic_round=dtype == torch.bfloat16)
    return made


def moved_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Gradients are read, parameters and states read and written."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    states: list[Any] = [t for p in held for name, t in optimizer.state[p].items() if name != "step"]
    parts = [part for t in states for part in ((t.codes, t.scale) if hasattr(t, "codes") else (t,))]  # torchao's
    return sum(p.grad.nbytes + 2 * p.nbytes for p in held) + sum(2 * part.nbytes for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--without-torchao", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    isa = machine.isa()
    rows: list[dict[str, object]] = []
    for size, shapes in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4096, 4096)
            copy = torch.empty_like(x)
            made = contenders(dtype, size == "large" and not options.without_torchao)
            optimizers = {name: make(parameters(shapes, dtype)) for name, make in made.items()}

            def read(x: torch.Tensor = x) -> None:
                _C.machine_read_once(isa, x.data_ptr(), x.nbytes, options.threads)

            runs: dict[str, Callable[[], object]] = {COPY: lambda x=x, copy=copy: copy.copy_(x), READ: read}
            runs |= {name: optimizer.step for name, optimizer in optimizers.items()}
            seconds = interleave(runs, options.rounds)
            for name, optimizer in optimizers.items():
                found = spread(seconds[name])
                row: dict[str, object] = {"parameters": size, "dtype": str(dtype), "optimizer": name, **found}
                row |= {"times_ours": ratio(seconds[name], seconds["ours"])}
                if size == "large":
                    moved = moved_bytes(optimizer)
                    shares = {"of_copy": ratio(seconds[COPY], seconds[name]) * moved / (2 * x.nbytes)}
                    shares |= {"of_read": ratio(seconds[READ], seconds[name]) * moved / x.nbytes}
                    row |= {"GB_per_s": moved / found["median_us"] / 1e3} | shares
                rows.append(row)
    save(__file__, rows)


if __name__ == "__main__":
    main()
