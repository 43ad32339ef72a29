"""Claim: q, k and v, or gate and up, with one right factor take a token less time than with factors of their own of the
same rank, nearly in the ratio of their bytes, and, fused, no more than with factors of their own of the same bytes.

Llama's shapes: K = 4096; q, k, v 4096, 1024 and 1024 rows, gate and up 11008 each. `joint(ratio)` beside factor(...)
for each matrix, at joint's rank and at joint's bytes. "joint" is Linears called one after the other, as a model without
fusion does, which multiply the input by the shared factor once; "joint, fused" is one call for all, as `fuse_` puts
them. Factors apart have no common call. Weights are cold: each call takes the next of enough copies to fill `--cold`
MB. Medians over the rounds.

    python benchmarks/joint_factors_cost_one_narrow_product.py [--threads N] [--rows 1,512] [--cold MB]
"""

import argparse
import copy
from collections.abc import Callable
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread, stored_copies
from torch import nn

from parco.fitting.methods import Factor, Joint, Method, Quantize
from parco.fitting.methods.method import Shape
from parco.nn import Linear, StoredWeight, joined, share_
from parco.weights import shared_tensors

COLUMNS = 4096
GROUPS = {"q, k, v": (4096, 1024, 1024), "gate, up": (11008, 11008)}
RATIO = 0.5


def layers(method: Method, shapes: list[Shape], copies: int) -> list[nn.ModuleList]:
    """So many copies of a group's layers, of random numbers."""
    weights = [
        StoredWeight(spec, spec.unpack(*stored_copies(spec, 1)[0]), torch.bfloat16) for spec in method.specs(shapes)
    ]
    if shared_tensors(weights[0].spec):
        share_(weights)
    first = nn.ModuleList(Linear(weight.pack_()) for weight in weights)
    return [first, *(copy.deepcopy(first) for _ in range(copies - 1))]


def size(method: Method, shapes: list[Shape]) -> int:
    return sum(weight.nbytes for weight in method.products(shapes))


def rotated(copies: list[nn.ModuleList], x: torch.Tensor, fused: bool) -> Callable[[], object]:
    """Multiplies x by the next copy, in layers one by one, or by all of a copy's rows at once."""
    turn = count()
    wholes = [joined.joined(list(each)) for each in copies] if fused else []

    def run() -> object:
        index = next(turn) % len(copies)
        if not fused:
            return [layer(x) for layer in copies[index]]
        whole = wholes[index]
        assert whole is not None
        return whole[0].apply(x, *whole[1])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", default="1,512")
    parser.add_argument("--cold", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for name, sizes in GROUPS.items():
        shapes = [(rows_, COLUMNS) for rows_ in sizes]
        rank = Factor(RATIO).rank_of((sum(sizes), COLUMNS))
        for bits in ("bf16", "int8:row"):

            def stored(method: Method, bits: str = bits) -> Method:
                return method if bits == "bf16" else method >> Quantize(bits)

            methods = {
                "joint": stored(Joint(Factor(rank=rank))),
                "same rank": stored(Factor(rank=rank)),
                "same bytes": stored(Factor(RATIO)),
            }
            made = {
                key: layers(method, shapes, (options.cold << 20) // size(method, shapes) + 1)
                for key, method in methods.items()
            }
            for each in made["joint"]:
                assert joined.join_(list(each))
            for height in map(int, options.rows.split(",")):
                x = torch.randn(height, COLUMNS).bfloat16()
                runs = {key: rotated(copies, x, False) for key, copies in made.items()}
                runs["joint, fused"] = rotated(made["joint"], x, True)
                with torch.no_grad():
                    seconds = interleave(runs, options.rounds if height < 64 else options.rounds // 5)
                for key, method in methods.items():
                    for kind in (key, f"{key}, fused") if key == "joint" else (key,):
                        rows.append(
                            {"group": name, "format": bits, "rows": height, "kind": kind, "method": str(method)}
                            | {"bytes": size(method, shapes), **spread(seconds[kind])}
                            | {"times_joint_fused": ratio(seconds[kind], seconds["joint, fused"])}
                        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
