"""Claim: a 1.1 B Llama stored in few bits decodes and reads prompts faster in parco than in llama.cpp on the same
numbers.

On two cores of avx512_vbmi, int4 decodes 1.87 times as fast (33.0 tokens per second, 17.5) and reads prompts 1.18
times, two rounds of `parco bench --whole --formats int4:32`. The results file is older than the one call for all
layers of a decoder, and of busy cores, medians and ranges of three rounds: int4 decodes 1.25 times (1.21 to 1.44)
and reads prompts 1.43 times (1.42 to 1.52) as fast, int8 1.06 (1.04 to 1.20) and 1.60 (1.53 to 1.63), ternary 1.03
(0.98 to 1.15) and 1.74 (1.47 to 1.75). In bf16 it was not faster: 0.90 (0.84 to 1.07) and 0.82 (0.71 to 1.38). What
kept a decode from more then, in CPU time of one thread: 9 to 15 ms of each step passed outside of the products, in
Transformers' Python and small operations, which llama.cpp has in C. Prompts reach a third of the machine's 16-bit
multiply-adds, which is what the kernels make; why no more was not looked into.

The model has TinyLlama's shape with random weights, made once under `--work`. For each format llama.cpp is given a GGUF
file with the very codes and scales that parco multiplies by; Transformers' own bf16 takes part too. All take turns in
one process on the same threads: a prompt of 512 tokens, then steps after a prompt of 64 (through forward calls with a
cache, through Transformers' generate, and for llama.cpp through llama_decode alone). It wants llama-cpp-python built
for this machine (CMAKE_ARGS=-DGGML_NATIVE=ON), some 12 GB of memory and an idle machine: llama.cpp's threads wait in a
loop.

    python benchmarks/whole_models_beside_llama_cpp.py [--work DIR] [--threads N] [--rounds R] [--steps S]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from fit_makes_a_1b_llama_decode_twice_as_fast import make

from parco import whole
from parco.cli import terminal
from parco.report import speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--formats", default=",".join(whole.FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)) / "original"
        if not (folder / "config.json").exists():
            make(folder)
        with terminal.progress() as bar:
            report = whole.run(
                folder,
                formats=options.formats.split(","),
                llama_cpp=True,
                steps=options.steps,
                rounds=options.rounds,
                progress=bar,
            )
    terminal.console().print(speeds.table(report))
    claim = Path(__file__)
    text = json.dumps({"claim": claim.stem, **report, "model": "random Llama, 1.1 B"}, indent=1) + "\n"
    (claim.parent / "results" / f"{claim.stem}.json").write_text(text)


if __name__ == "__main__":
    main()
