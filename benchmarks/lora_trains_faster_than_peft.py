"""Claim: LoRA trains at least 1.3 times as many tokens per second as PEFT in bf16, at no more memory.

    python benchmarks/lora_trains_faster_than_peft.py [--layers N] [--rounds N] [--threads N]

Rank 16 on all linear layers of the blocks of a Llama of 100 million parameters with new weights, 4 sequences of 512
tokens, AdamW. PEFT trains with the base in bf16, and under autocast with it in fp32. Each contender lives in a process
of its own; they take steps in turn (`beside_peft`).
"""

import argparse
import dataclasses
import statistics

from beside_peft import SMALL, Contender, race
from interleaved import ratio, save

SEQUENCES, WINDOW = 4, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SMALL.layers)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    shape = dataclasses.replace(SMALL, layers=options.layers)
    parco = Contender("parco", shape, SEQUENCES, WINDOW, threads=options.threads)
    bf16 = dataclasses.replace(parco, library="peft")
    contenders = {"peft bf16": bf16, "peft autocast": dataclasses.replace(bf16, autocast=True), "parco": parco}
    ran = dict(zip(contenders, race(list(contenders.values()), options.rounds), strict=True))
    rows: list[dict[str, object]] = [
        {
            "contender": name,
            "layers": options.layers,
            "parameters": own.parameters,
            "tokens_per_second": SEQUENCES * WINDOW / statistics.median(own.seconds),
            "slowest_s": max(own.seconds),
            "fastest_s": min(own.seconds),
            "parco_times_faster": ratio(own.seconds, ran["parco"].seconds),
            "memory_mb": own.memory,
            "loss": own.losses[-1],
        }
        for name, own in ran.items()
    ]
    save(__file__, rows)


if __name__ == "__main__":
    main()
