"""Claim: gpt-oss on a CPU, read as OpenAI published it, decodes twice as fast as Transformers runs it in bf16, takes
prompts in a third of the time, and takes a third of the memory.

Layers of gpt-oss-20b's widths (two of 24, one with a window and one without; a vocabulary of 32,000, so that the layers
tell) of random codes, in a folder laid out as the published one, twice: by Transformers, which expands the experts to
bf16, and by `parco.hub.load`, fused. Steps of decoding after 16 tokens and after 1,024, and prompts of 512, in turn.

    python benchmarks/gpt_oss_runs_from_its_codes.py [--layers N] [--threads N] [--rounds R]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from interleaved import save
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedTokenizerFast

import parco
from parco import hub
from parco.fitting.measure import decode_seconds, prefill_seconds

VOCABULARY = 32_000
PROMPT, CONTEXT, STEPS = 512, 1024, 8


def write(folder: Path, layers: int) -> None:
    """A checkpoint as OpenAI's: experts as codes and scales, everything else in bf16."""
    config = AutoConfig.for_model("gpt_oss", num_local_experts=32, num_hidden_layers=layers, vocab_size=VOCABULARY)
    config.eos_token_id = config.pad_token_id = 0
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in made.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            shape = count, rows, columns // 32
            state[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
            state[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8, generator=draw)
        else:
            own = torch.randn(tensor.shape, generator=draw) * 0.02 + (name.endswith("norm.weight"))
            state[name] = own.to(torch.bfloat16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = ["GptOssForCausalLM"], "bfloat16"
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "quantization_config": {"quant_method": "mxfp4"}}, default=str)
    )
    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>", pad_token="<s>").save_pretrained(folder)


def late_seconds(model: Any) -> float:
    """Seconds of a step of decoding after CONTEXT tokens."""
    ids = torch.randint(0, VOCABULARY, (1, CONTEXT), generator=torch.Generator().manual_seed(3))
    seconds: list[float] = []
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(STEPS):
            began = time.perf_counter()
            out = model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.layers)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
        ).eval()
        ours = hub.load(folder, low_memory=False).model
    parco.fuse_(ours)
    contenders: dict[str, Any] = {"transformers": theirs, "parco": ours}
    runs = {"decode": decode_seconds, "late": late_seconds, "prompt": lambda model: prefill_seconds(model, PROMPT)}
    seen = {(what, who): list[float]() for what in runs for who in contenders}
    for turn in range(options.rounds + 1):
        for what, run in runs.items():
            for who, model in contenders.items():
                seconds = run(model)
                if turn:
                    seen[what, who].append(seconds)
    titles = {"decode": "a token after 16", "late": f"a token after {CONTEXT}", "prompt": f"{PROMPT} tokens"}
    rows: list[dict[str, object]] = []
    for what in runs:
        first, second = seen[what, "transformers"], seen[what, "parco"]
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        rows.append(
            {
                "layers": options.layers,
                "what": titles[what],
                "transformers_ms": median(first) * 1e3,
                "parco_ms": median(second) * 1e3,
                "times": median(ratios),
                "times_low": min(ratios),
                "times_high": max(ratios),
            }
        )
    size = {who: sum(each.nbytes for each in model.parameters()) / 1e6 for who, model in contenders.items()}
    rows.append({"layers": options.layers, "what": "megabytes", **size, "times": size["transformers"] / size["parco"]})
    save(__file__, rows)


if __name__ == "__main__":
    main()
