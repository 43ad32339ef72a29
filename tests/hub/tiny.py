"""Random models of every architecture that the hub is tested with, a few thousand numbers each, and a tokenizer to go
with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from parco import hub, nn
from parco.weights import Quantized

VOCABULARY = 301
SENTENCES = ["def fit(model, size):", "    return model", "class Weight:", "import torch", "for a, b in pairs.items():"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 12}
_EXPERTS = {
    "hidden_size": 40,  # Transformers multiplies dense experts with a kernel that wants rows of 16 bytes
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    **_GROUPED,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, **_GROUPED, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_COMMON, **_GROUPED, "tie_word_embeddings": False, "sliding_window": 16},
    "qwen2": {**_COMMON, **_GROUPED, "tie_word_embeddings": True},
    "qwen3": {**_COMMON, **_GROUPED, "tie_word_embeddings": True},
    "gemma": {**_COMMON, **_GROUPED, "tie_word_embeddings": True},
    "gemma3_text": {**_COMMON, **_GROUPED, "tie_word_embeddings": True, "sliding_window": 16},
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_inner": 50, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True,
    },
    "gpt_neox": {**_COMMON, "tie_word_embeddings": False},
    "phi": {**_COMMON, "tie_word_embeddings": False},
    "phi3": {**_COMMON, "tie_word_embeddings": False},
    "mixtral": {**_COMMON, **_EXPERTS, "intermediate_size": 56, "num_local_experts": 4},
    "qwen2_moe": {
        **_COMMON, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 30,
    },
    "gpt_oss": {**_COMMON, **_EXPERTS, "intermediate_size": 56, "num_local_experts": 4, "sliding_window": 16},
    "qwen3_moe": {**_COMMON, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24},
}  # fmt: skip


def model(architecture: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random model in evaluation mode; biases and norms are random too, so that losing one is seen."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def folder(path: Path, architecture: str = "llama", shard: str = "1GB", **changes: Any) -> Path:
    """A dense model's folder as a person would have it."""
    model(architecture, **changes).save_pretrained(path, max_shard_size=shard)
    tokenizer().save_pretrained(path)
    return path


def store(made: Any, format: str = "int4:32", embeddings: str | None = "int8:row") -> Any:
    """Stores every matrix of the blocks in `format` and embeddings and head in `embeddings`, in place."""
    for group in nn.groups(made):
        chosen = embeddings if group.kind in ("embed", "head") else format
        for name in group.members:
            if chosen is None or group.kind == "router":
                continue
            matrix = nn.matrix(made, name)
            nn.replace_(made, name, nn.StoredWeight.encode(Quantized(chosen, tuple(matrix.shape)), matrix))
            if group.kind == "embed":
                break  # a tied head has followed
    return made


def inputs() -> torch.Tensor:
    return torch.arange(3, 25).reshape(2, 11)


@torch.no_grad()
def logits(made: Any) -> torch.Tensor:
    return made(inputs()).logits


def refused(folder: Path, message: str) -> None:
    """`hub.load` says why in one line that names the folder."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        hub.load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
