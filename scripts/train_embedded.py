"""Train the small Python model that `parco fit` uses when no model is named.

Why a model of our own: the first run of parco must work with no network and show the effect on real
text, so a real (if small) language model ships with the package. It is a Llama of about 10 M parameters with its
own byte-level BPE tokenizer, trained on the one text that every machine with Python has: the sources
of the standard library with its tests. Some modules are held out and are the evaluation text.

The optimizer is Muon for the matrices of the blocks (Jordan et al. 2024) and AdamW for embeddings, head and norms; the
schedule is warm-up, constant, linear decay to zero, so that a run that is resumed with another `--steps` equals a run
that had that number from the start, as long as the decay had not begun.

    python scripts/train_embedded.py --out src/parco/hub/embedded --steps 2400

Everything random is seeded. A checkpoint is written every 100 steps under `--work`; the same command resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "csv.py",
    "fnmatch.py",
    "graphlib.py",
    "heapq.py",
    "json/decoder.py",
    "json/encoder.py",
    "queue.py",
    "shlex.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
    "wave.py",
    "zipapp.py",
    "test/test_bisect.py",
    "test/test_csv.py",
    "test/test_heapq.py",
    "test/test_queue.py",
    "test/test_shlex.py",
    "test/test_textwrap.py",
    "test/test_graphlib.py",
)
CONTEXT = 512
VOCABULARY = 8192


def read_sources() -> list[tuple[str, str, str]]:
    """Every readable source file of the standard library: (path, sha256, text), sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name:
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        found.append((name, hashlib.sha256(raw).hexdigest(), text))
    return found


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCABULARY tokens; 0 is <s> (begins a file), 1 is </s>, 2 is <pad>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def prepare(out: Path, work: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenizer, texts and the two token streams (training, held out), from the standard library."""
    stream = work / "tokens.pt"
    if stream.exists():
        saved = torch.load(stream, weights_only=True)
        return saved["train"], saved["held_out"]
    sources = read_sources()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    train = [text for name, _, text in sources if name not in HELD_OUT]
    held = [text for name, _, text in sources if name in HELD_OUT]
    assert len(held) == len(HELD_OUT), "a held-out module is missing from this Python"
    random.Random(seed).shuffle(train)
    tokenizer = train_tokenizer(train)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    (out / "heldout.txt").write_text("".join(held))
    calibration, size = [], 0
    for text in train:
        piece = text[:20_000]
        if size + len(piece.encode()) > 700_000:
            break
        calibration.append(piece)
        size += len(piece.encode())
    (out / "calibration.txt").write_text("".join(calibration))
    with (out / "sources.tsv").open("w") as file:
        file.write(f"# Python {platform.python_version()}; sha256, bytes, split, path under the standard library\n")
        for name, digest, text in sources:
            file.write(f"{digest}\t{len(text.encode())}\t{'held_out' if name in HELD_OUT else 'train'}\t{name}\n")

    def tokens(texts: list[str]) -> torch.Tensor:
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(texts):
            ids.extend(encoding.ids)
            ids.append(1)
        return torch.tensor(ids, dtype=torch.int16)

    saved = {"train": tokens(train), "held_out": tokens(held)}
    torch.save(saved, stream)
    return saved["train"], saved["held_out"]


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=832,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T` against `labels`, in chunks of rows so that the logits are never whole.

    hidden [rows, width], weight [vocabulary, width], labels [rows] -> scalar. The gradients are made in the same pass;
    this removes a quarter of a step's time here, which went into writing and reading [8192, 8192] tensors.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        loss, rows = hidden.new_zeros(()), len(hidden)
        for begin in range(0, rows, 512):
            x, y = hidden[begin : begin + 512], labels[begin : begin + 512, None]
            logits = x @ weight.T
            lse = logits.logsumexp(1, keepdim=True)
            loss += (lse - logits.gather(1, y)).sum()
            probability = logits.sub_(lse).exp_()
            probability.scatter_add_(1, y, torch.full_like(lse, -1.0))
            torch.mm(probability, weight, out=grad_hidden[begin : begin + 512])
            grad_weight.addmm_(probability.T, x)
        ctx.save_for_backward(grad_hidden.div_(rows), grad_weight.div_(rows))
        return loss / rows

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def batches(stream: torch.Tensor, rows: int, seed: int, start: int):
    """Windows of CONTEXT+1 tokens, each pass in an order and at an offset of its own; begins at step `start`."""
    step, epoch = 0, 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        offset = int(torch.randint(0, CONTEXT, (1,), generator=generator))
        count = (len(stream) - offset - 1) // CONTEXT
        order = torch.randperm(count, generator=generator)
        for i in range(0, count - rows + 1, rows):
            if step >= start:
                rows_at = [offset + int(j) * CONTEXT for j in order[i : i + rows]]
                yield epoch + i / count, torch.stack([stream[a : a + CONTEXT + 1] for a in rows_at]).long()
            step += 1
        epoch += 1


@torch.no_grad()
def evaluate(model: torch.nn.Module, held: torch.Tensor, windows: int) -> float:
    """Mean nats per token over the first `windows` windows of the held-out text."""
    total, count = 0.0, 0
    for i in range(0, min(windows, (len(held) - 1) // CONTEXT), 8):
        rows = [held[j * CONTEXT : (j + 1) * CONTEXT + 1] for j in range(i, min(i + 8, windows))]
        rows = torch.stack([r for r in rows if len(r) == CONTEXT + 1]).long()
        logits = model(rows[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to zero")
    parser.add_argument("--rows", type=int, default=16, help="windows per step")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--stop-at", type=int, default=None, help="save a checkpoint at this step and stop")
    options = parser.parse_args()

    train, held = prepare(options.out, options.work, options.seed)
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(configuration())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original")
    adam = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    start, curve, spent = 0, [], 0.0
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        start, curve, spent = saved["step"], saved["curve"], saved["spent"]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(train):,} training tokens, {len(held):,} held out, from step {start}",
        flush=True,
    )
    body = torch.compile(model.model, dynamic=False)

    def save_checkpoint(step: int) -> None:
        torch.save(
            {
                "model": model.state_dict(),
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
                "step": step,
                "curve": curve,
                "spent": spent,
            },
            checkpoint.with_suffix(".new"),
        )
        checkpoint.with_suffix(".new").replace(checkpoint)

    begin_decay = round(options.steps * (1 - options.decay))
    began, running = time.perf_counter(), 0.0
    for step, (passes, rows) in zip(
        range(start, options.steps), batches(train, options.rows, options.seed, start), strict=False
    ):
        scale = min((step + 1) / 100, 1.0)
        if step >= begin_decay:
            scale *= (options.steps - step) / (options.steps - begin_decay)
        for optimizer, rate in ((muon, 0.02), (adam, 2e-3)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        hidden = body(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        loss = HeadLoss.apply(hidden.flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        muon.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        value = loss.item()
        assert math.isfinite(value), f"the loss became {value} at step {step}"
        running = value if running == 0.0 else 0.95 * running + 0.05 * value
        done = step + 1
        if done % 20 == 0:
            now = spent + time.perf_counter() - began
            print(f"step {done} pass {passes:.2f} loss {running:.4f} {now:.0f} s", flush=True)
        if done % 100 == 0 or done == options.steps:
            entry = {"step": done, "passes": round(passes, 3), "train": round(running, 4)}
            if done % 200 == 0 or done == options.steps:
                windows = 10_000 if done == options.steps else 32
                entry["held_out"] = round(evaluate(model, held, windows), 4)
                print(entry, flush=True)
            curve.append(entry)
            spent += time.perf_counter() - began
            began = time.perf_counter()
            save_checkpoint(done)
        if done == options.stop_at:
            sys.exit(f"stopped at step {done}; the same command without --stop-at goes on")

    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, options.out / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(options.out)
    model.generation_config.save_pretrained(options.out)
    record = {
        "command": "python scripts/train_embedded.py " + " ".join(sys.argv[1:]),
        "seed": options.seed,
        "steps": options.steps,
        "rows": options.rows,
        "context": CONTEXT,
        "parameters": parameters,
        "training_tokens": len(train),
        "held_out": HELD_OUT,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": curve,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
