"""Claim: for one row a matrix of low rank in int8 takes one call that is little longer than reading its bytes, and a
quantized matrix with its correction less time than its parts one after the other; many rows take as long as the parts.

Weights are cold: each call takes the next of enough copies to fill `--cold` MB. `times_apart` is the parts' time over
the call's, the parts multiplied by their own operations and added in bf16; `of_plain_read` is the time of a plain read
of all tensors of another copy over the call's; `times_torch_bf16` and `times_dense_bf16` are the times of a dense bf16
matrix of the same shape, by PyTorch and by parco. Medians over the rounds.

    python benchmarks/low_rank_and_sums_read_at_memory_speed.py [--threads N] [--rows 1,8,64,512] [--cold MB]
"""

import argparse
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco import _C, machine
from parco.weights import Dense, LowRank, Quantized, Sum, Weight

SIZE = 4096


def low_rank(rank: int, format: str) -> Weight:
    shapes = ((SIZE, rank), (rank, SIZE))
    left, right = (Dense(shape, format) if format == "bf16" else Quantized(format, shape) for shape in shapes)
    return LowRank(left, right)


WEIGHTS = {
    "int8, rank 1/4": low_rank(SIZE // 4, "int8:row"),
    "bf16, rank 1/4": low_rank(SIZE // 4, "bf16"),
    "int4:32 + bf16 of rank 16": Sum(Quantized("int4:32", (SIZE, SIZE)), low_rank(16, "bf16")),
    "int4:32 + bf16 of rank 64": Sum(Quantized("int4:32", (SIZE, SIZE)), low_rank(64, "bf16")),
}


def apart(spec: Weight, x: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The parts of `spec` by operations of their own."""
    parts: list[tuple[Weight, tuple[torch.Tensor, ...]]] = []
    for part in spec.parts().values():
        own = len(part.tensors())
        parts.append((part, tensors[:own]))
        tensors = tensors[own:]
    if not parts:
        return spec.apply(x, *tensors)
    if isinstance(spec, LowRank):
        (left, of_left), (right, of_right) = parts
        return apart(left, apart(right, x, of_right), of_left)
    (first, own), *others = parts
    total = apart(first, x, own)
    for part, own in others:
        total = total + apart(part, x, own)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--cold", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    isa = machine.isa()
    rows: list[dict[str, object]] = []
    whole = Dense((SIZE, SIZE), "bf16")
    dense = stored_copies(whole, (options.cold << 20) // whole.nbytes + 1)
    for name, spec in WEIGHTS.items():
        stored = stored_copies(spec, (options.cold << 20) // spec.nbytes + 1)
        turn = count()

        def read(stored=stored, turn=turn) -> None:
            for tensor in stored[next(turn) % len(stored)]:
                _C.machine_read_once(isa, tensor.data_ptr(), tensor.nbytes, options.threads)

        for height in map(int, options.rows.split(",")):
            x = torch.randn(height, SIZE).bfloat16()
            runs = {
                "one call": lambda x=x, spec=spec, stored=stored, turn=turn: spec.apply(
                    x, *stored[next(turn) % len(stored)]
                ),
                "apart": lambda x=x, spec=spec, stored=stored, turn=turn: apart(
                    spec, x, stored[next(turn) % len(stored)]
                ),
                "read": read,
                "torch": lambda x=x, turn=turn: torch.nn.functional.linear(x, dense[next(turn) % len(dense)][0]),
                "dense": lambda x=x, turn=turn: whole.apply(x, *dense[next(turn) % len(dense)]),
            }
            with torch.inference_mode():
                seconds = interleave(runs, options.rounds if height < 64 else options.rounds // 3)
            one = seconds["one call"]
            rows.append(
                {"weights": name, "rows": height, **spread(one)}
                | {"apart_us": spread(seconds["apart"])["median_us"], "times_apart": ratio(seconds["apart"], one)}
                | {"of_plain_read": ratio(seconds["read"], one)}
                | {f"times_{peer}_bf16": ratio(seconds[peer], one) for peer in ("torch", "dense")}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
