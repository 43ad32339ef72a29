"""Claim: a 1.1 B Llama fitted with `--size 0.3 --heal 0` decodes >= 2.2 times as fast; the fit takes bf16 bytes + 3 GB.

The model has TinyLlama's shape with random weights (so only bytes, memory and speed are judged here, never quality).
It is made once under `--work`. The peer is the same model in bf16 through Transformers; both are timed in one
process, in turns, on the same prompt: decode is the median time of a step with a growing cache, prefill that of 512
tokens.

    python benchmarks/fit_makes_a_1b_llama_decode_twice_as_fast.py --work DIR
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import parco
from parco.hub import embedded_path

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def make(folder: Path) -> None:
    """Random TinyLlama in bf16 with the embedded model's tokenizer (ids below 8,192 are all that it emits)."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)


@torch.no_grad()
def decode_and_prefill(model: torch.nn.Module, prompt: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of one prefill of `prompt` and the median seconds of the `steps` decodes after it."""
    begin = time.perf_counter()
    out = model(prompt, use_cache=True)
    prefill = time.perf_counter() - begin
    token, cache, seconds = out.logits[:, -1:].argmax(-1), out.past_key_values, []
    for _ in range(steps):
        begin = time.perf_counter()
        out = model(token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        seconds.append(time.perf_counter() - begin)
    return prefill, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    original, fitted = options.work / "original", options.work / "fitted"
    if not (original / "config.json").exists():
        subprocess.run([sys.executable, __file__, "--work", str(options.work), "--rounds", "0"], check=True) if (
            options.rounds
        ) else make(original)
    if not options.rounds:
        return
    begin = time.perf_counter()
    command = ["parco", "fit", str(original), "--size", str(options.size), "--heal", "0", "--out", str(fitted)]
    subprocess.run([sys.executable, "-m", "parco.cli", *command[1:]], check=True)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    limit = sum(f.stat().st_size for f in original.glob("*.safetensors")) + 3e9

    prompt = torch.randint(3, 8000, (1, 512), generator=torch.Generator().manual_seed(1))
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = {"bf16": load(original, dtype=torch.bfloat16).eval(), "fitted": load(fitted).eval()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round_ in range(options.rounds + 1):
        for name, model in models.items():
            pair = decode_and_prefill(model, prompt, 16)
            if round_:
                times[name].append(pair)
    prefill = [a[0] / b[0] for a, b in zip(times["bf16"], times["fitted"], strict=True)]
    decode = [a[1] / b[1] for a, b in zip(times["bf16"], times["fitted"], strict=True)]
    result = {
        "command": " ".join(command).replace(str(options.work), "DIR"),
        "fit_seconds": round(seconds),
        "fit_peak_bytes": peak,
        "fit_peak_limit": int(limit),
        "decode_speedup": {"median": statistics.median(decode), "min": min(decode), "max": max(decode)},
        "prefill_speedup": {"median": statistics.median(prefill), "min": min(prefill), "max": max(prefill)},
        "bf16_decode_tokens_per_second": 1 / statistics.median(t[1] for t in times["bf16"]),
        "fitted_decode_tokens_per_second": 1 / statistics.median(t[1] for t in times["fitted"]),
        "bf16_prefill_tokens_per_second": 512 / statistics.median(t[0] for t in times["bf16"]),
        "fitted_prefill_tokens_per_second": 512 / statistics.median(t[0] for t in times["fitted"]),
        "machine": parco.machine.detect().cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps(result, indent=1)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / (Path(__file__).stem + ".json")).write_text(text + "\n")


if __name__ == "__main__":
    main()
