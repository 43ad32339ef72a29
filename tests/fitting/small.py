"""A random Llama of a few thousand numbers with a tokenizer and a text, small enough that a whole fit takes seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WINDOW = 32
VOCABULARY = 288
WORDS = ["def", "return", "self", "import", "for", "in", "range", "value", "None", "True", "class", "if", "else"]
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": WINDOW,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip


def model(architecture: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, **{**SETTINGS, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def folder(path: Path, **changes: Any) -> Path:
    """The model and its tokenizer saved as a person would have them."""
    model(**changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def text(words: int = 400) -> str:
    draw = random.Random(1)
    return " ".join(draw.choice(WORDS) for _ in range(words))
