"""save_gguf: what a reader of the file gets are the numbers that parco stores, and llama.cpp computes what Transformers
does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub import tiny

from parco import hub, nn
from parco.bench import LlamaCpp
from parco.fitting.convert import convert_
from parco.hub import ggml
from parco.weights import Quantized

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
STORED = {
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
    "int8:32": "Q8_0",
    "int8:128": "Q8_0",
    "int5:64": "Q8_0",
    "int4:32": "Q4_0",
    "int4:64": "Q4_0",
    "int3:32": "Q4_0",
    "int2:32": "Q4_0",
    "mxfp4": "MXFP4",
}
ROUNDED = {
    "ternary": "TQ2_0",
    "ternary:row": "TQ2_0",
    "ternary5": "TQ1_0",
    "ternary5:row": "TQ1_0",
    "int8:row": "Q8_0",
    "int4:32:asym": "Q4_1",
    "int4:32x32": "Q4_0",
}


def model(architecture: str = "llama", **changes: Any) -> Any:
    return tiny.model(architecture, **{**SIZES, **changes})


def read(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Type and numbers of every tensor, as the library gguf decodes them."""
    return {
        found.name: (
            found.tensor_type.name,
            torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).reshape(
                tuple(reversed([int(size) for size in found.shape]))
            ),
        )
        for found in gguf.GGUFReader(file).tensors
    }


def as_transformers_has_it(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Pair i of a head is its rows 2i and 2i + 1 in llama.cpp's Llama, i and i + half in Transformers'."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("format", [*STORED, *ROUNDED])
def test_a_reader_gets_the_numbers_that_are_stored(format: str, tmp_path: Path) -> None:
    made = model()
    convert_(made, format)
    found = read(hub.save_gguf(made, tiny.tokenizer(), tmp_path / "model.gguf", round_scales=format in ROUNDED))
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 1), "mlp.down_proj": ("ffn_down", 0)}
    for ours, (theirs, heads) in names.items():
        kind, numbers = found[f"blk.1.{theirs}.weight"]
        assert kind == (STORED | ROUNDED)[format]
        wanted = nn.matrix(made, f"model.layers.1.{ours}").float()
        numbers = as_transformers_has_it(numbers, heads) if heads else numbers
        if format in ROUNDED:
            # A scale is rounded to fp16; with a zero point its product with the scale is too.
            largest = wanted.abs().amax()
            assert (numbers - wanted).abs().max() <= 2.0**-11 * largest * (2 if "asym" in format else 1)
            assert not torch.equal(numbers, wanted) or format == "int4:32x32"
        else:
            assert torch.equal(numbers, wanted)
    bias = as_transformers_has_it(found["blk.1.attn_q.bias"][1], 4)
    assert torch.equal(bias, made.model.layers[1].self_attn.q_proj.bias.float())
    assert torch.equal(found["output_norm.weight"][1], made.model.norm.weight.float())
    assert torch.equal(found["token_embd.weight"][1], made.model.embed_tokens.weight.float())


@pytest.mark.parametrize("name", list(ggml.BLOCK))
def test_a_dense_matrix_is_rounded_as_the_reader_s_own_library_does(name: str, tmp_path: Path) -> None:
    made = model()
    found = read(hub.save_gguf(made, None, tmp_path / "model.gguf", name.lower(), ends="Q8_0"))
    kind, numbers = found["blk.0.ffn_gate.weight"]
    assert kind == name
    matrix = nn.matrix(made, "model.layers.0.mlp.gate_proj").float().numpy()
    number = gguf.GGMLQuantizationType[name]
    assert torch.equal(numbers, torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix, number), number)))
    assert found["output.weight"][0] == found["token_embd.weight"][0] == "Q8_0"


def test_a_stored_matrix_is_rounded_to_another_type(tmp_path: Path) -> None:
    made = model()
    convert_(made, "nf4:64")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: .*nf4.*'Q8_0'\) rounds"):
        hub.save_gguf(made, None, tmp_path / "model.gguf")
    found = read(hub.save_gguf(made, None, tmp_path / "model.gguf", "Q8_0"))
    wanted = nn.matrix(made, "model.layers.0.mlp.up_proj").float()
    assert (found["blk.0.ffn_up.weight"][1] - wanted).abs().max() <= wanted.abs().max() / 127 * 0.51


def test_a_tied_matrix_is_written_once(tmp_path: Path) -> None:
    made = tiny.store(model("qwen3", head_dim=64), embeddings="int8:32")
    found = read(hub.save_gguf(made, tiny.tokenizer(), tmp_path / "model.gguf"))
    assert "output.weight" not in found
    assert torch.equal(found["token_embd.weight"][1], made.lm_head.weight.dense())


@pytest.mark.parametrize("columns", [32, 64, 256])
def test_scales_that_are_no_fp16_numbers_are_refused_or_rounded(columns: int) -> None:
    spec = Quantized("int4:32:fp32", (3, columns))
    tensors = dict(zip(spec.tensors(), spec.encode(torch.randn(3, columns)), strict=True))
    with pytest.raises(ValueError, match="no fp16 numbers"):
        ggml.rearranged(spec, tensors)
    assert ggml.rearranged(spec, tensors, round_scales=True).shape == (3, columns // 32 * 18)
    tensors["scale"] = tensors["scale"] * 1e9
    with pytest.raises(ValueError, match="beyond fp16"):
        ggml.rearranged(spec, tensors, round_scales=True)


@pytest.mark.parametrize(
    ("architecture", "changes", "arguments", "message"),
    [
        ("gpt2", {}, {}, "'gpt2'"),
        ("mistral", {**SIZES, "sliding_window": 16}, {}, "sliding_window=16"),
        ("llama", {**SIZES, "hidden_act": "gelu"}, {}, "hidden_act='gelu'"),
        ("llama", SIZES, {"type": "Q3_K"}, "type='Q3_K'"),
        ("llama", SIZES, {"ends": "best"}, "ends='best'"),
        ("llama", {}, {"type": "Q8_0"}, "blocks of 32"),
        (
            "llama",
            {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "dynamic",
        ),
    ],
)
def test_what_cannot_be_is_named(
    architecture: str, changes: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = tiny.model(architecture, **changes)
    with pytest.raises(ValueError, match=message):
        hub.save_gguf(made, None, tmp_path / "model.gguf", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_the_former_file(tmp_path: Path) -> None:
    made = model()
    file = hub.save_gguf(made, None, tmp_path / "model.gguf")
    before = file.read_bytes()
    convert_(made, "ternary")
    with pytest.raises(ValueError, match="no fp16 numbers"):
        hub.save_gguf(made, None, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"does not know this tokenizer.*Whitespace"):
        hub.save_gguf(model(), tokenizer, tmp_path / "model.gguf")


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    made = tiny.model(architecture, **{**SIZES, "dtype": torch.float32, **changes})
    ids = tiny.inputs()[0].tolist() * 2
    with torch.no_grad():
        wanted = made(torch.tensor([ids])).logits[0]
    with LlamaCpp(hub.save_gguf(made, tiny.tokenizer(), tmp_path / "model.gguf"), 2, context=64) as theirs:
        # Its attention keeps keys and values in fp16: 2⁻¹¹ of each, and some of that is left after two layers.
        assert (theirs.logits(ids) - wanted).norm() < 2e-3 * wanted.norm()


def test_llama_cpp_computes_with_the_stored_numbers(tmp_path: Path) -> None:
    """It rounds activations to 8 bits in groups of 32 (256 for TQ1_0 and TQ2_0): 2⁻⁸ of the greatest of a group, about
    1% in all. Other numbers than those stored would differ by tens of percent.
    """
    pytest.importorskip("llama_cpp")
    ids = tiny.inputs()[0].tolist()
    for format in ("int8:32", "int4:32", "int4:32:asym", "ternary", "ternary5", "mxfp4"):
        made = tiny.model("llama", **{**SIZES, "dtype": torch.float32})
        convert_(made, format)
        file = hub.save_gguf(made, None, tmp_path / "model.gguf", round_scales=True)
        with torch.no_grad():
            wanted = made(torch.tensor([ids])).logits[0]
        with LlamaCpp(file, 2, context=64) as theirs:
            assert (theirs.logits(ids) - wanted).norm() < 0.04 * wanted.norm(), format


def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    loaded = hub.load(hub.embedded_path())
    file = hub.save_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (
        "def fit(model, size=0.35):\n    return  model",
        "naïve café 123456\t§ é",
        "for a, b in pairs.items():",
    ):
        assert theirs.tokenize(text.encode(), special=True) == loaded.tokenizer(text)["input_ids"]


def test_pieces_are_cut_as_sentencepiece_s_heirs_do(tmp_path: Path) -> None:
    """A tokenizer of the kind that Llama 2 has: ▁ for spaces, bytes as a last resort."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=tiny.VOCABULARY + 40, special_tokens=special, show_progress=False)
    made.train_from_iterator(tiny.SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    size = max(len(tokenizer), tiny.VOCABULARY)
    file = hub.save_gguf(model(vocab_size=size), tokenizer, tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in ("return model", "for a, b in pairs", "import torch: class é"):
        assert theirs.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]
