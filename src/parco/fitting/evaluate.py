"""Judge a model end to end: loss, KL to the original and agreement on held-out windows, speed, peak memory, a
completion.

The loss is that of a plain Transformers loop over the same windows in the model's own dtype:

    for window in windows: model(input_ids=window, labels=window).loss

that is, the mean over windows of the mean cross entropy of every token but the first given those before it.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parco.fitting.calibrate import rows_of, vocabulary_of
from parco.fitting.stages import Progress
from parco.fitting.stream import windows_in_batches


@dataclass(frozen=True)
class Quality:
    """Of one model on some windows. `kl` and `top1` compare with the original: nats per token, share of positions.

    `original_loss` is the original's on the same windows; the model's own where there was none beside it. `losses` is
    the model's mean loss on each window.
    """

    loss: float
    kl: float
    top1: float
    original_loss: float
    losses: Sequence[float] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.inference_mode()
def quality(model: nn.Module, windows: Tensor, progress: Progress, original: nn.Module | None = None) -> Quality:
    """`model` on windows [W, T], beside `original` on the same; without it KL is 0 and the agreement 1."""
    progress.stage("evaluate", windows.shape[0])
    other_loss = kl = agreed = 0.0
    losses: list[float] = []
    for part in windows_in_batches(windows, rows_of(windows.shape[1], vocabulary_of(model))):
        tokens = windows[part]
        logs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), -1)
        losses += _losses(logs, tokens)
        if original is not None:
            other = torch.log_softmax(original(input_ids=tokens, use_cache=False).logits.float(), -1)
            other_loss += sum(_losses(other, tokens)) / windows.shape[0]
            kl += float(nn.functional.kl_div(logs, other, reduction="sum", log_target=True))
            agreed += float((logs.argmax(-1) == other.argmax(-1)).sum())
        progress.advance(tokens.shape[0])
    loss = sum(losses) / len(losses)
    if original is None:
        return Quality(loss, 0.0, 1.0, loss, losses)
    return Quality(loss, kl / windows.numel(), agreed / windows.numel(), other_loss, losses)


def _losses(logs: Tensor, tokens: Tensor) -> list[float]:
    """Mean −log p of every token but the first, for each window of log-probabilities [B, T, V]."""
    found = nn.functional.nll_loss(logs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return found.view(tokens.shape[0], -1).mean(1).tolist()


def standard_error(losses: Sequence[float], others: Sequence[float]) -> float | None:
    """That of the difference of two mean losses on the same windows; None for a single window."""
    if len(losses) < 2:
        return None
    return statistics.stdev(one - other for one, other in zip(losses, others, strict=True)) / math.sqrt(len(losses))


PROMPT_TOKENS = 48
NEW_TOKENS = 96


def sample_prompt(tokenizer: Any, held: Tensor) -> str:
    """The beginning of the held-out text that both models are asked to go on with."""
    window = held[min(1, held.shape[0] - 1)]
    return tokenizer.decode(window[: min(PROMPT_TOKENS, window.shape[0] // 2)], skip_special_tokens=True)


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str, limit: int) -> str:
    """The model's greedy continuation of `prompt`, without the prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, -max(1, limit - 1) :]
    room = max(1, min(NEW_TOKENS, limit - ids.shape[1]))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=filler
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# VmHWM belongs to the process's own memory; getrusage's maximum would include the parent's, which a fork shares for a
# moment.
_PEAK = """
import re, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
import parco
from transformers import AutoModelForCausalLM
from parco.fitting.measure import decode_seconds
decode_seconds(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", local_files_only=True).eval(), 16)
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def peak_memory(folder: Path) -> int | None:
    """Peak resident bytes of a fresh process that loads the folder with Transformers and decodes 16 tokens; None where
    it failed.
    """
    command = [sys.executable, "-c", _PEAK, str(folder), str(torch.get_num_threads())]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    return int(lines[-1].split()[1]) if done.returncode == 0 and lines else None
