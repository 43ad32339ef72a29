"""Tiny models with random weights, one per architecture, from configurations alone: nothing is downloaded."""

import torch
import transformers as t

COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 5}
HEADS = {"head_dim": 12}

CONFIGS = {
    "llama": lambda: t.LlamaConfig(**COMMON),
    "llama tied": lambda: t.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama odd": lambda: t.LlamaConfig(
        **{**COMMON, "hidden_size": 36, "intermediate_size": 77}, head_dim=6, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: t.MistralConfig(**COMMON),
    "qwen2 tied": lambda: t.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: t.Qwen3Config(**COMMON, **HEADS),
    "gpt2": lambda: t.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": lambda: t.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "gemma": lambda: t.GemmaConfig(**COMMON, **HEADS),
    "gemma2": lambda: t.Gemma2Config(**COMMON, **HEADS, query_pre_attn_scalar=12),
    "gemma3": lambda: t.Gemma3TextConfig(**COMMON, **HEADS),
    "phi": lambda: t.PhiConfig(**COMMON),
    "phi3": lambda: t.Phi3Config(**COMMON),
    "mixtral": lambda: t.MixtralConfig(**COMMON, num_local_experts=5),
    "qwen2-moe": lambda: t.Qwen2MoeConfig(**COMMON, **MIXTURE, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**COMMON, **MIXTURE, **HEADS),
    "gpt-oss": lambda: t.GptOssConfig(
        **COMMON, **HEADS, num_local_experts=5, num_experts_per_tok=2, sliding_window=6,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    ),
    "opt": lambda: t.OPTConfig(
        vocab_size=101, hidden_size=48, ffn_dim=88, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
    ),
}  # fmt: skip
TIED = {"llama tied", "qwen2 tied", "gpt2", "gemma", "gemma2", "gemma3", "opt"}


def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> t.PreTrainedModel:
    """The model `name` in eval mode, its weights large enough that every layer moves the logits."""
    torch.manual_seed(seed)
    made = t.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval().to(dtype)


def tokens(rows: int = 2, columns: int = 9) -> torch.Tensor:
    return torch.randint(3, 101, (rows, columns), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(made: torch.nn.Module) -> torch.Tensor:
    return made(tokens()).logits
