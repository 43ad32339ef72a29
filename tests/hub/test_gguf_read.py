"""GGUF files in: the numbers that the reader's own library decodes, and the model that `save_gguf` was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub import tiny
from tests.hub.test_gguf import LLAMA3, ROUNDED, SIZES, STORED, read

from parco import hub, nn
from parco.fitting.convert import convert_
from parco.hub import ggml, gguf_read, vocabulary
from parco.nn import StoredWeight

gguf = pytest.importorskip("gguf")


def model(architecture: str = "llama", **changes: Any) -> Any:
    return tiny.model(architecture, **{**SIZES, **changes})


def content(file: Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    """Metadata but for the model's name, and type and bytes of every tensor."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if name != "general.name"}
    return fields, {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


@pytest.mark.parametrize("format", [*STORED, *ROUNDED])
def test_what_was_exported_comes_back_bit_for_bit(format: str, tmp_path: Path) -> None:
    made = model()
    convert_(made, format)
    file = hub.save_gguf(made, tiny.tokenizer(), tmp_path / "model.gguf", round_scales=format in ROUNDED)
    loaded = hub.load(file)
    if format in STORED:
        for name in nn.linears(made):
            assert torch.equal(nn.matrix(loaded.model, name).float(), nn.matrix(made, name).float())
        assert torch.allclose(tiny.logits(loaded.model).float(), tiny.logits(made).float(), atol=0.05)
    again = hub.save_gguf(loaded.model, loaded.tokenizer, tmp_path / "again.gguf")
    if format not in ("fp32", "fp16"):  # dense numbers take the narrowest dtype that holds all of them
        assert content(again) == content(file)
    stored = loaded.model.model.layers[0].mlp.up_proj.weight
    assert isinstance(stored, StoredWeight) is (format not in ("fp32", "fp16", "bf16"))
    folder = hub.save(loaded.model, loaded.tokenizer, tmp_path / "ours")
    assert torch.equal(tiny.logits(hub.load(folder).model), tiny.logits(loaded.model))


@pytest.mark.parametrize("name", list(ggml.BLOCK))
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_files_of_llama_cpp_s_own_rounding(name: str, architecture: str, tmp_path: Path) -> None:
    """Embedding and head are quantized as well; a tied head shares the embedding's codes."""
    file = hub.save_gguf(model(architecture, head_dim=64), tiny.tokenizer(), tmp_path / "model.gguf", name)
    loaded, numbers = hub.load(file, "float32").model, read(file)
    for ours, theirs in {
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down", "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.embed_tokens": "token_embd",
    }.items():  # fmt: skip
        kind, wanted = numbers[f"{theirs}.weight"]
        assert kind == name
        assert torch.equal(nn.matrix(loaded, ours).float(), wanted)
    queries = nn.matrix(loaded, "model.layers.0.self_attn.q_proj").float()
    turned = numbers["blk.0.attn_q.weight"][1]
    if architecture == "llama":
        turned = turned.reshape(4, -1, 2, 256).transpose(1, 2).reshape(256, 256)
    assert torch.equal(queries, turned)
    shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert shared is (architecture == "qwen3")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
        ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "dtype": torch.float32}),
    ],
)
def test_every_architecture_computes_what_it_did(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made = model(architecture, **changes)
    file = hub.save_gguf(made, tiny.tokenizer(), tmp_path / "model.gguf")
    loaded = hub.load(file)
    assert loaded.model.dtype == made.dtype
    assert loaded.model.config.rms_norm_eps == made.config.rms_norm_eps
    # Frequencies of the rotary embedding are divided by factors that the file rounds to fp32.
    again = hub.load(file, "float32").model
    assert torch.allclose(tiny.logits(again), tiny.logits(made.float()), atol=1e-4)
    assert loaded.model.config.max_position_embeddings == made.config.max_position_embeddings
    assert loaded.path == file
    assert len(loaded.fingerprint) == 64


def test_the_narrowest_dtype_that_holds_the_numbers(tmp_path: Path) -> None:
    made = model(dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.half())
    assert hub.load(hub.save_gguf(made, tiny.tokenizer(), tmp_path / "half.gguf")).model.dtype == torch.float16
    with torch.no_grad():
        made.model.norm.weight[3] = 1 + 2**-20
    file = hub.save_gguf(made, tiny.tokenizer(), tmp_path / "single.gguf")
    assert hub.load(file).model.dtype == torch.float32
    assert hub.load(file, "bfloat16").model.dtype == torch.bfloat16


def _tokenizers() -> dict[str, Callable[[], Any]]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from parco.hub.vocabulary import PATTERNS

    def byte_level(cut: str) -> Any:
        made = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
        pattern = next(pattern for pattern, name in PATTERNS.items() if name == cut)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        made.normalizer = normalizers.NFC() if cut == "qwen2" else None
        trainer = trainers.BpeTrainer(
            vocab_size=tiny.VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        made.train_from_iterator(tiny.SENTENCES, trainer)
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        made.add_tokens(["<tool>"])
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")

    def pieces() -> Any:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
        made.train_from_iterator(tiny.SENTENCES, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            chat_template="{{ messages[0].content }}",
        )  # fmt: skip

    return {
        "gpt-2": tiny.tokenizer,
        "llama-bpe": lambda: byte_level("llama-bpe"),
        "qwen2": lambda: byte_level("qwen2"),
        "pieces": pieces,
    }


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "pieces"])
def test_the_tokenizer_cuts_text_as_it_did(kind: str, tmp_path: Path) -> None:
    tokenizer = _tokenizers()[kind]()
    made = model(vocab_size=len(tokenizer) + 3)
    again = hub.load(hub.save_gguf(made, tokenizer, tmp_path / "model.gguf")).tokenizer
    for text in (
        "def fit(model, size=0.35):\n    return  model",
        "naïve café 123456\t§ é",
        "</s>pairs<tool>.items()<s>",
    ):
        wanted = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == wanted
        assert again.decode(wanted) == tokenizer.decode(wanted)
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True).strip() == text.strip().replace(
            "</s>", ""
        ).replace("<s>", "")
    for name in ("bos_token", "eos_token", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_the_shipped_model_survives_the_way_there_and_back(tmp_path: Path) -> None:
    loaded = hub.load(hub.embedded_path())
    again = hub.load(hub.save_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf"))
    text = hub.embedded_texts().heldout[:2000]
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
    assert again.tokenizer(text)["input_ids"][:64] == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = model()
    convert_(made, "int4:32")
    return hub.save_gguf(made, tiny.tokenizer(), tmp_path_factory.mktemp("file") / "model.gguf")


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        hub.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_damaged_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    broken = tmp_path / "model.gguf"
    for size in (3, 40, 2000, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:size])
        state = "is truncated, or newer than the library gguf that is installed" if size > 3 else "is no GGUF file"
        assert refused(broken) == f"{str(broken)!r} {state}: copy or download it again", size
    broken.write_bytes(b"PK\3\4" + whole[4:])
    assert "no GGUF file" in refused(broken)
    with pytest.raises(FileNotFoundError):
        hub.load(tmp_path / "absent.gguf")


def test_low_memory_maps_the_file_and_otherwise_the_weights_are_owned(tmp_path: Path) -> None:
    file = hub.save_gguf(model(), tiny.tokenizer(), tmp_path / "model.gguf")
    mapped, owned = hub.load(file, low_memory=True).model, hub.load(file, low_memory=False).model
    before = tiny.logits(owned)
    with file.open("r+b") as stream:
        stream.seek(-20_000, 2)
        stream.write(bytes(20_000))
    assert torch.equal(before, tiny.logits(owned))
    assert not torch.equal(before, tiny.logits(mapped))


def rewritten(file: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """The file with metadata or tensors (name -> (numbers, type)) changed."""
    reader = gguf.GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: field.contents() for name, field in fields.items()}
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    change(values, tensors)
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for name, value in values.items():
        kinds = [*fields[name].types, None] if name in fields else [gguf.GGUFValueType.UINT32, None]
        writer.add_key_value(name, value, kinds[0], kinds[1])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


Change = Callable[[dict[str, Any], dict[str, Any]], object]
UP = "blk.0.ffn_up.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "an architecture": (lambda values, tensors: values.update({"general.architecture": "mamba"}), "'mamba'"),
    "a lost number": (lambda values, tensors: values.pop("llama.block_count"), "llama.block_count is None"),
    "experts": (lambda values, tensors: values.update({"llama.expert_count": 8}), "llama.expert_count is 8"),
    "no heads": (
        lambda values, tensors: values.update({"llama.attention.head_count": 0}), "head_count is 0; a positive number",
    ),
    "heads that share no width": (
        lambda values, tensors: values.update({"llama.attention.head_count": 3}), "its metadata make no llama: ",
    ),
    "no frequency": (lambda values, tensors: values.update({"llama.rope.freq_base": 0.0}), "freq_base is 0.0; a"),
    "no context": (lambda values, tensors: values.update({"llama.context_length": 0}), "context_length is 0; a"),
    "a token that is none": (
        lambda values, tensors: values.update({"tokenizer.ggml.bos_token_id": 99999}),
        f"bos_token_id is 99999; a token's number below {tiny.VOCABULARY}",
    ),
    "merges": (
        lambda values, tensors: values.update({"tokenizer.ggml.merges": ["abc", "zz"]}), "its tokenizer is damaged: ",
    ),
    "a lost tensor": (lambda values, tensors: tensors.pop(UP), f"no tensor '{UP}', the model's model.layers.0.mlp.up"),
    "a tensor too many": (
        lambda values, tensors: tensors.update({"blk.9.ffn_up.weight": tensors[UP]}), "'blk.9.ffn_up.weight', which",
    ),
    "a shape": (
        lambda values, tensors: tensors.update({UP: tensors["blk.0.ffn_down.weight"]}),
        f"{UP}: it is (256, 512), and the metadata says (512, 256)",
    ),
    "a type": (
        lambda values, tensors: tensors.update({
            UP: (gguf.quants.quantize(torch.ones(512, 256).numpy(), gguf.GGMLQuantizationType.Q5_0),
                 gguf.GGMLQuantizationType.Q5_0),
        }),
        f"{UP}: it is of the type Q5_0, and parco reads F32, F16, BF16, Q8_0, Q4_0, Q4_1, TQ2_0, TQ1_0, MXFP4",
    ),
    "a tokenizer": (lambda values, tensors: values.update({"tokenizer.ggml.pre": "viking"}), "'viking'"),
    "no tokenizer": (lambda values, tensors: values.update({"tokenizer.ggml.model": "none"}), "tokenizer is 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(what: str, file: Path, tmp_path: Path) -> None:
    change, message = BROKEN[what]
    assert message in refused(rewritten(file, tmp_path / "model.gguf", change))


def test_metadata_of_another_kind(file: Path) -> None:
    """What no writer of integers writes: texts and numbers below 0."""
    fields, tensors = gguf_read._open(file)
    for key, found in (("embedding_length", "abc"), ("context_length", -5), ("attention.head_count", [4, 4])):
        with pytest.raises(ValueError, match=rf"llama\.{key} is .*; a positive number \(int\) is needed"):
            gguf_read._config({**fields, f"llama.{key}": found}, tensors)
    with pytest.raises(ValueError, match="bos_token_id is 'a'"):
        vocabulary.read({**fields, "tokenizer.ggml.bos_token_id": "a"})


def test_a_file_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    text = refused(hub.save_gguf(model(), None, tmp_path / "model.gguf"))
    assert "its tokenizer is 'none' of 0 tokens" in text
    assert "no file without one" in text


def test_a_file_that_was_only_rewritten_loads(file: Path, tmp_path: Path) -> None:
    again = rewritten(file, tmp_path / "model.gguf", lambda values, tensors: None)
    assert torch.equal(tiny.logits(hub.load(again).model), tiny.logits(hub.load(file).model))


def test_what_llama_cpp_computes_is_what_is_loaded(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    from parco.bench import LlamaCpp

    dense = hub.save_gguf(model(dtype=torch.float32), tiny.tokenizer(), tmp_path / "dense.gguf")
    for number, name in ((2, "Q4_0"), (3, "Q4_1"), (7, "Q8_0")):  # llama_ftype
        file = tmp_path / f"{name}.gguf"
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.pure = number, True  # no type of its own for the head
        assert llama_cpp.llama_model_quantize(str(dense).encode(), str(file).encode(), settings) == 0
        ids = tiny.inputs()[0].tolist()
        with torch.no_grad():
            wanted = hub.load(file, "float32").model(torch.tensor([ids])).logits[0]
        with LlamaCpp(file, 2, context=64) as theirs:
            assert (theirs.logits(ids) - wanted).norm() < 0.04 * wanted.norm(), name
