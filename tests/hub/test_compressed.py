"""compressed-tensors, in and out: the package's own compressor and decompressor on one side, parco on the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub import tiny

from parco import adapters, hub, nn
from parco.fitting.convert import convert_
from parco.formats import parse
from parco.products import Activations, Native

pytest.importorskip("compressed_tensors")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
SCHEMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4 by group": ("int4:64", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}),
    "int4 by group, asymmetric": (
        "int4:128:asym", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False},
    ),
    "int4 by row, asymmetric": (
        "int4:row:asym", "pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False},
    ),
    "int3 by group": ("int3:32", "pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "int8 by row": ("int8:row", "pack-quantized", {**INT8, "strategy": "channel"}),
    "int8 by row, asymmetric": ("int8:row:asym", "pack-quantized", {**INT8, "strategy": "channel", "symmetric": False}),
    "plain int8 by row": ("int8:row", "int-quantized", {**INT8, "strategy": "channel"}),
    "plain int8, asymmetric": ("int8:row:asym", "int-quantized", {**INT8, "strategy": "channel", "symmetric": False}),
    "plain int8, one scale": ("int8:tensor", "int-quantized", {**INT8, "strategy": "tensor"}),
    "fp8, one scale": ("fp8_e4m3:tensor", "float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 by row": ("fp8_e4m3:row", "float-quantized", {**FP8, "strategy": "channel"}),
    "fp8 by block": ("fp8_e4m3:64x128", "float-quantized", {**FP8, "strategy": "block", "block_structure": [64, 128]}),
    "nvfp4": (
        "nvfp4", "nvfp4-pack-quantized",
        {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
    "mxfp4": ("mxfp4", "mxfp4-pack-quantized", {"num_bits": 4, **MX}),
    "mxfp6": ("mxfp6_e2m3", "mxfp6-pack-quantized", {"num_bits": 6, **MX}),
    "mxfp8": ("mxfp8_e4m3", "mxfp8-quantized", {"num_bits": 8, **MX}),
}  # fmt: skip
"""What the package calls it, and what parco does (scales, which have the model's dtype there, aside)."""

GLOBAL = 3 * 2.0**-8
"""How far the package's NVFP4 is off: it divides the scale by the global one, and multiplies, in bf16."""


def model(architecture: str = "llama", **changes: Any) -> Any:
    return tiny.model(architecture, **{**SIZES, **changes})


def compress(
    made: Any, folder: Path, format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> Any:
    """Writes the model as llm-compressor would, with scales found by the package; returns it with the package's own
    decompressed matrices in place."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = QuantizationArgs(**weights)
    activations = None if inputs is None else QuantizationArgs(**inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=activations, format=format)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*layers.1.mlp.*"], format=format
    )
    apply_quantization_config(made, config, show_progress=False)
    for module in made.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            matrix = module.weight.detach().float()
            least, most = _extremes(matrix, weights)
            general = None
            if weights["strategy"] == "tensor_group":
                general = generate_gparam(matrix.min(), matrix.max())
                module.weight_global_scale.data = general
            scale, zero = calculate_qparams(least, most, arguments, global_scale=general)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
            if not arguments.symmetric:
                module.weight_zero_point.data = zero.reshape(module.weight_scale.shape).round().to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(folder)
    compressor.update_config(str(folder))
    tiny.tokenizer().save_pretrained(folder)
    compressor.decompress_model(made)
    return made


def _extremes(matrix: torch.Tensor, weights: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest of every block, of the shape that the package's scales have."""
    rows, columns = matrix.shape
    size = {"tensor": (rows, columns), "channel": (1, columns), "block": tuple(weights.get("block_structure", ()))}
    height, width = size.get(weights["strategy"], (1, weights.get("group_size", 0)))
    blocks = matrix.reshape(rows // height, height, columns // width, width)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_package_compressed_is_read_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    format, written, weights = SCHEMES[name]
    theirs = compress(model(dtype=dtype), tmp_path / "theirs", written, weights)
    loaded = hub.load(tmp_path / "theirs")
    for path in ("self_attn.k_proj", "mlp.down_proj"):
        stored = loaded.model.get_submodule(f"model.layers.0.{path}").weight
        parts = (stored.spec.format.element, stored.spec.format.block, type(stored.spec.format.scale))
        wanted = parse(format)
        assert parts == (wanted.element, wanted.block, type(wanted.scale))
        matrix = theirs.get_submodule(f"model.layers.0.{path}").weight
        if name == "nvfp4":
            assert torch.allclose(stored.dense(), matrix.float(), rtol=GLOBAL, atol=0)
        else:
            assert torch.equal(stored.dense(matrix.dtype), matrix)
    assert isinstance(loaded.model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    assert isinstance(loaded.model.lm_head, torch.nn.Linear)
    assert loaded.notes == ()
    if dtype == torch.float32 and name != "nvfp4":
        assert torch.allclose(tiny.logits(loaded.model), tiny.logits(theirs.float()), atol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_read_by_the_package(name: str, tmp_path: Path) -> None:
    """The package is asked through Transformers, as a person would."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    format, written, _ = SCHEMES[name]
    made = model()
    convert_(made, format, product="activations(int8)" if written == "int-quantized" else "native")
    folder = hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["format"], settings["ignore"]) == (written, ["lm_head"])
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for path in ("self_attn.q_proj", "mlp.gate_proj"):
        matrix = theirs.get_submodule(f"model.layers.1.{path}").weight
        ours = nn.matrix(made, f"model.layers.1.{path}").to(matrix.dtype)
        assert torch.allclose(matrix.float(), ours.float(), rtol=GLOBAL if name == "nvfp4" else 0, atol=0)
    again = hub.load(folder)
    assert [stored.product for stored in stores(again.model)] == [stored.product for stored in stores(made)]
    for ours, theirs in zip(stores(made), stores(again.model), strict=True):
        assert torch.allclose(theirs.dense(), ours.dense(), rtol=2.0**-22 if name == "nvfp4" else 0, atol=0)
    if name != "nvfp4":
        assert torch.equal(tiny.logits(again.model), tiny.logits(made))


def stores(made: Any) -> list[nn.StoredWeight]:
    return [module for module in made.modules() if isinstance(module, nn.StoredWeight)]


def test_a_model_of_several_formats_is_decompressed_layer_by_layer(tmp_path: Path) -> None:
    """Targets by name; the package loads compressed tensors and decompresses them when the model first runs."""
    from transformers import AutoModelForCausalLM

    made = model(dtype=torch.float32)
    convert_(made, "int4:32:fp32", filter_fn=lambda module, name: "mlp" in name)
    convert_(made, "fp8_e4m3:row", filter_fn=lambda module, name: "o_proj" in name)
    convert_(made, "int8:row", filter_fn=lambda module, name: "q_proj" in name, product="activations(int8)")
    folder = hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "mixed-precision"
    assert sorted(group["format"] for group in settings["config_groups"].values()) == [
        "float-quantized", "int-quantized", "pack-quantized",
    ]  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tiny.logits(theirs)
    for name, place in nn.linears(made).items():
        wanted = nn.matrix(made, name).float()
        assert torch.equal(theirs.get_submodule(name).weight, wanted), place.name
    assert torch.equal(tiny.logits(hub.load(folder).model), tiny.logits(made))


def test_inputs_that_are_rounded_there(tmp_path: Path) -> None:
    for name, inputs, note in (
        ("int8", PER_TOKEN, None),
        ("fp8", {**PER_TOKEN, "type": "float"}, "the inputs of 11 layers are rounded there (fp8, per token)"),
        ("static", {"num_bits": 8, "type": "int", "strategy": "tensor"}, "(int8, by scales that were found beforehand"),
    ):
        made = compress(model(), tmp_path / name, "int-quantized", {**INT8, "strategy": "channel"}, inputs)
        loaded = hub.load(tmp_path / name)
        products = {stored.product for stored in stores(loaded.model)}
        assert products == {Activations("int8") if note is None else Native()}
        assert (loaded.notes == ()) if note is None else (note in loaded.notes[0]), loaded.notes
        if note is None:  # absmax / 127.5 there, absmax / 127 here: both round x by half of 2⁻⁷ of its row's largest
            wanted = tiny.logits(made)
            assert (tiny.logits(loaded.model) - wanted).norm() < 0.05 * wanted.norm()


def test_outputs_and_caches_that_are_rounded_there_and_nvfp4_s_global_scale(tmp_path: Path) -> None:
    made = model()
    convert_(made, "nvfp4")
    folder = hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8, "type": "float"}
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (folder / "config.json").write_text(json.dumps(config))
    first, second = hub.load(folder).notes
    assert "the outputs of 14 layers are rounded there (fp8, by scales that were found beforehand, per tensor)" in first
    assert "keys and values" in second
    state = load_file(folder / "model.safetensors")
    state[f"{Q}.weight_global_scale"].zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"q_proj: weight_global_scale: it is 0\.0, and must be a positive number"):
        hub.load(folder)


@pytest.mark.parametrize("format", ["nf4:64", "ternary5"])
def test_what_has_no_format_there_is_named_or_written_dense(format: str, tmp_path: Path) -> None:
    made = model()
    convert_(made, format, filter_fn=lambda module, name: "down_proj" in name)
    convert_(made, "int4:32", filter_fn=lambda module, name: "up_proj" in name)
    message = rf"layers\.0\.mlp\.down_proj: quantized\({format}.*no such format; dense=True \(--dense\) writes"
    with pytest.raises(ValueError, match=message):
        hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    loaded = hub.load(hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out", dense=True))
    wanted = nn.matrix(made, "model.layers.0.mlp.down_proj").bfloat16()
    assert torch.equal(loaded.model.model.layers[0].mlp.down_proj.weight, wanted)
    assert str(loaded.model.model.layers[0].mlp.up_proj.weight.spec) == "quantized(int4:32, 256x128)"
    (tmp_path / "out" / "old.txt").write_text("of the folder that is replaced")
    folder = hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out", dense=True)
    assert not (folder / "old.txt").exists()
    with pytest.raises(FileExistsError):
        hub.save_compressed(made, tiny.tokenizer(), tiny.folder(tmp_path / "mine").parent / "mine", dense=True)


@pytest.mark.parametrize("method", ["joint(0.5)", "joint(0.5)>>int8:row", "rotate>>int4:64", "int4:64+factor(rank=8)"])
@pytest.mark.parametrize("adapter", [None, "lora(4)"])
def test_every_way_out_gives_the_same_logits(method: str, adapter: str | None, tmp_path: Path) -> None:
    """Of matrices of several parts, among them a factor that layers hold together: dense there, and in GGUF."""
    pytest.importorskip("gguf")
    made = model(dtype=torch.float32)
    convert_(made, method)
    if adapter is not None:
        adapters.add_(made, adapter)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad:
                    assert "adapters" in name
                    parameter.normal_(std=0.1)
        adapters.to_sum_(made, "default")
    written = (
        hub.save_compressed(made, tiny.tokenizer(), tmp_path / "theirs", dense=True),
        hub.save_gguf(made, tiny.tokenizer(), tmp_path / "model.gguf", "F32"),
        hub.save(made, tiny.tokenizer(), tmp_path / "ours"),
    )
    wanted = tiny.logits(made)
    for place in written:
        assert torch.allclose(tiny.logits(hub.load(place, "float32").model), wanted, atol=1e-4), place.name
    assert not any(".weight." in name for name in load_file(tmp_path / "theirs" / "model.safetensors"))


def test_ties_conv1d_and_experts() -> None:
    from parco.hub.compressed import compressed

    shared = tiny.store(model("qwen2"), "int4:32", embeddings="int8:row")
    with pytest.raises(ValueError, match=r"embed_tokens: .*head and embedding share it"):
        compressed(shared, dense=False)
    content, _ = compressed(shared, dense=True)
    assert torch.equal(content["model.embed_tokens.weight"], shared.lm_head.weight.dense(torch.bfloat16))
    for architecture, message in (("gpt2", "was a Conv1D"), ("mixtral", "is an expert")):
        made = tiny.model(architecture)
        convert_(made, "int8:row")
        with pytest.raises(ValueError, match=message):
            compressed(made, dense=True)


def test_a_stored_embedding_of_its_own(tmp_path: Path) -> None:
    made = tiny.store(model("llama"), "int4:32", embeddings="int8:row")
    loaded = hub.load(hub.save_compressed(made, tiny.tokenizer(), tmp_path / "out"))
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(made))
    assert [stored.spec for stored in stores(loaded.model)] == [stored.spec for stored in stores(made)]


def test_a_read_model_saves_itself_as_parco_does(tmp_path: Path) -> None:
    compress(model(), tmp_path / "theirs", *SCHEMES["int4 by group, asymmetric"][1:])
    loaded = hub.load(tmp_path / "theirs")
    again = hub.load(hub.save(loaded.model, loaded.tokenizer, tmp_path / "ours"))
    assert torch.equal(tiny.logits(again.model), tiny.logits(loaded.model))
    assert hub.load(tmp_path / "theirs", "float32").model.model.norm.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = model()
    convert_(made, "int4:32")
    return hub.save_compressed(made, tiny.tokenizer(), tmp_path_factory.mktemp("written") / "model")


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
BROKEN: dict[str, tuple[Change, str]] = {
    "a lost scale": (lambda config, state: state.pop(f"{Q}.weight_scale"), f"{Q}: weight_scale: the file has"),
    "lost codes": (lambda config, state: state.pop(f"{Q}.weight_packed"), f"{Q}: weight_packed: the file has"),
    "a shape": (
        lambda config, state: state.update({f"{Q}.weight_packed": state[f"{Q}.weight_packed"][:, 1:].contiguous()}),
        f"{Q}: weight_packed: it is torch.int32 (128, 15), and must be torch.int32 (128, 16)",
    ),
    "a dtype": (
        lambda config, state: state.update({f"{Q}.weight_scale": state[f"{Q}.weight_scale"].double()}),
        "scales are torch.float64",
    ),
    "scales laid out otherwise": (
        lambda config, state: state.update({f"{Q}.weight_scale": state[f"{Q}.weight_scale"].t().contiguous()}),
        f"{Q}: weight_scale: it is (4, 128), and int4:32 has (128, 4) here",
    ),
    "another layer's": (
        lambda config, state: state.update({f"{Q}.weight_shape": torch.tensor([128, 64])}), "it is [128, 64]",
    ),
    "a layer that is none": (
        lambda config, state: state.update({"model.layers.9.mlp.up_proj.weight_scale": torch.ones(1)}), "no such layer",
    ),
    "an ignored layer": (lambda config, state: config["ignore"].append(f"re:{Q}"), "not quantized"),
    "activation order": (
        lambda config, state: state.update({f"{Q}.weight_g_idx": torch.arange(128) % 4}), "no neighbouring columns",
    ),
    "a format": (lambda config, state: config["config_groups"]["group_0"].update(format="marlin-24"), "'marlin-24'"),
    "a rotation": (
        lambda config, state: config.update(transform_config={"config_groups": {"u": {}}}), "transform_config",
    ),
    "sparsity in words": (lambda config, state: config.update(sparsity_config=["2:4"]), "sparsity_config is ['2:4']"),
    "inputs in words": (
        lambda config, state: config["config_groups"]["group_0"].update(input_activations="int8"),
        "input_activations that are 'int8'",
    ),
    "one ignored layer": (lambda config, state: config.update(ignore="lm_head"), "its targets are 'lm_head'"),
    "a number ignored": (lambda config, state: config.update(ignore=5), "its targets are 5"),
    "a list of bits": (
        lambda config, state: config["config_groups"]["group_0"]["weights"].update(num_bits=[4], type="float"),
        "num_bits=[4]",
    ),
    "a list of strategies": (
        lambda config, state: config["config_groups"]["group_0"]["weights"].update(strategy=["group"]), "['group']",
    ),
    "no groups": (lambda config, state: config.pop("config_groups"), "no config_groups"),
    "a pattern": (lambda config, state: config["ignore"].append("re:("), "its target 're:(' is no pattern"),
    "only a plan": (lambda config, state: config.update(quantization_status="frozen"), "'frozen'"),
    "a strategy": (
        lambda config, state: config["config_groups"]["group_0"]["weights"].update(strategy="spiral"), "'spiral'",
    ),
    "float4 of no kind": (
        lambda config, state: config["config_groups"]["group_0"]["weights"].update(type="float"), "parco has no format",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(what: str, written: Path, tmp_path: Path) -> None:
    change, message = BROKEN[what]
    config = json.loads((written / "config.json").read_text())
    state = load_file(written / "model.safetensors")
    change(config["quantization_config"], state)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tiny.refused(tmp_path, message)
