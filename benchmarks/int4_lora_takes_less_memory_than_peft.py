"""Claim: LoRA over a base in int4 takes at most 0.6 times the memory of PEFT over one in bf16, and no more time.

    python benchmarks/int4_lora_takes_less_memory_than_peft.py [--layers N] [--rounds N] [--threads N] [--base FORMAT]

Rank 16 on all linear layers of the blocks of a Llama of 1.1 billion parameters with new weights, one sequence of 512
tokens, AdamW. Each contender lives in a process of its own; they take steps in turn (`beside_peft`).
"""

import argparse
import dataclasses
import statistics

from beside_peft import LARGE, Contender, race
from interleaved import ratio, save

WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LARGE.layers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", default="int4:32")
    options = parser.parse_args()
    peft = Contender("peft", dataclasses.replace(LARGE, layers=options.layers), 1, WINDOW, threads=options.threads)
    contenders = {
        "peft bf16": peft,
        f"parco {options.base}": dataclasses.replace(peft, library="parco", base=options.base),
    }
    ran = dict(zip(contenders, race(list(contenders.values()), options.rounds), strict=True))
    ours = ran[f"parco {options.base}"]
    rows: list[dict[str, object]] = [
        {
            "contender": name,
            "layers": options.layers,
            "parameters": own.parameters,
            "tokens_per_second": WINDOW / statistics.median(own.seconds),
            "slowest_s": max(own.seconds),
            "fastest_s": min(own.seconds),
            "parco_times_faster": ratio(own.seconds, ours.seconds),
            "memory_mb": own.memory,
            "parcos_memory_share": ours.memory / own.memory,
        }
        for name, own in ran.items()
    ]
    save(__file__, rows)


if __name__ == "__main__":
    main()
