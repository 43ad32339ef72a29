"""GPTQ and AWQ checkpoints: written by their published layouts, bit by bit, decoded by formula, and read by parco."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub import tiny

from parco import hub, nn
from parco.hub.gptq import Awq
from parco.nn import StoredWeight, linears

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2,
}  # fmt: skip
SHUFFLED = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's order_map: the column that each of a word's nibbles holds, lowest nibble first."""


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 [K, N] below 2**bits -> int32 [⌈K·bits/32⌉, N]: number i begins at bit i·bits of its column."""
    count = -(-len(codes) * bits // 32)
    packed = torch.zeros(count + 1, codes.shape[1], dtype=torch.int64)
    for index, row in enumerate(codes):
        word, bit = divmod(index * bits, 32)
        packed[word] |= (row << bit) & 0xFFFFFFFF
        packed[word + 1] |= row >> (32 - bit)
    return as_int32(packed[:count])


def as_int32(numbers: torch.Tensor) -> torch.Tensor:
    """Of 0 to 2**32 - 1, the int32 of the same bits."""
    return torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).to(torch.int32)


class Quantizer:
    """Rounds the matrices of a model and writes them as a library does; `matrices` is what they stand for."""

    def __init__(self, method: str, bits: int = 4, size: int = 64, symmetric: bool = False, **settings: Any) -> None:
        self.method, self.bits, self.size, self.symmetric = method, bits, size, symmetric
        self.settings = {"quant_method": method, "bits": bits, "group_size": size, **settings}
        self.matrices: dict[str, torch.Tensor] = {}

    def save(self, made: Any, folder: Path, beside: str | None = None) -> Path:
        state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        for name, place in linears(made).items():
            if name != "lm_head":
                del state[f"{name}.weight"]
                parts = self.parts(name, nn.matrix(made, name).double())
                assert place.shape == tuple(self.matrices[name].shape)
                state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        made.config.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if beside is None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "quantization_config": self.settings}))
        else:
            (folder / beside).write_text(json.dumps(self.settings))
        return folder

    def parts(self, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = matrix.shape
        size = columns if self.size == -1 else self.size
        groups = torch.arange(columns) // size
        if self.settings.get("desc_act"):
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        count, most = columns // size, (1 << self.bits) - 1
        scale = torch.empty(rows, count, dtype=torch.float16)
        zero = torch.empty(rows, count, dtype=torch.int64)
        for index in range(count):
            part = matrix[:, groups == index]
            least, greatest = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if self.symmetric:
                scale[:, index], zero[:, index] = part.abs().amax(1) / (most / 2), 1 << (self.bits - 1)
            else:
                scale[:, index] = (greatest - least) / most
                zero[:, index] = (-least / scale[:, index].double()).round().clamp(0, most)
        codes = (matrix / scale.double()[:, groups] + zero[:, groups]).round().clamp(0, most).long()
        self.matrices[name] = (codes - zero[:, groups]) * scale.double()[:, groups]
        if self.method == "awq":
            return {
                "qweight": self.shuffled(codes.t()), "qzeros": self.shuffled(zero.t()), "scales": scale.t(),
            }  # fmt: skip
        stored = words(zero, self.bits).t()
        if self.settings.get("checkpoint_format", "gptq") == "gptq":
            stored = self.minus_one(zero)
        return {"qweight": words(codes.t(), self.bits), "qzeros": stored, "scales": scale.t(), "g_idx": groups.int()}

    def minus_one(self, zero: torch.Tensor) -> torch.Tensor:
        """The first format of the zeros, as GPTQModel makes it of the second."""
        if self.bits == 3:
            return words((zero - 1) & 7, 3).t()
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return as_int32((words(zero, self.bits).t().long() - ones) & 0xFFFFFFFF)

    @staticmethod
    def shuffled(codes: torch.Tensor) -> torch.Tensor:
        """int64 [R, N] -> int32 [R, N/8]."""
        eights = codes.reshape(len(codes), -1, 8)
        return as_int32(sum(eights[..., column] << (4 * place) for place, column in enumerate(SHUFFLED)))


def model(architecture: str = "llama", **changes: Any) -> Any:
    return tiny.model(architecture, torch.float16, **{**SIZES, **changes})


def check(loaded: Any, quantizer: Quantizer, format: str | None) -> None:
    """Every matrix is stored in the format (None: dense) and stands for the numbers of the formula."""
    for name, wanted in quantizer.matrices.items():
        stored = loaded.model.get_submodule(name).weight
        if format is None:
            assert torch.equal(nn.matrix(loaded.model, name), wanted.to(torch.float16))
        else:
            assert str(stored.spec.format) == format
            assert torch.equal(stored.dense().double(), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_scales_of_gptq(bits: int, version: str, symmetric: bool, tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", bits, 64, symmetric, checkpoint_format=version, desc_act=False)
    made = model()
    with (
        torch.no_grad()
    ):  # rows without negative numbers have 0 as their zero point, which the first format borrows for
        made.model.layers[0].mlp.up_proj.weight[5:8].abs_()
    loaded = hub.load(quantizer.save(made, tmp_path / "theirs"))
    check(loaded, quantizer, f"int{bits}:64:{'' if symmetric else 'asym:'}fp16")
    assert loaded.notes == ()
    assert loaded.model.dtype == torch.float16


def test_logits_are_those_of_the_numbers(tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", 4, 32)
    loaded = hub.load(quantizer.save(model(), tmp_path / "theirs"), "float32").model
    made = model().float()
    with torch.no_grad():
        for name, wanted in quantizer.matrices.items():
            made.get_submodule(name).weight.copy_(wanted)
    assert torch.allclose(tiny.logits(loaded), tiny.logits(made), atol=1e-4)


def test_a_group_that_is_a_whole_row_and_a_file_beside_the_configuration(tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", 4, -1, True)
    loaded = hub.load(quantizer.save(model(), tmp_path / "theirs", beside="quantize_config.json"))
    check(loaded, quantizer, "int4:row:fp16")
    quantizer = Quantizer("awq", 4, 128)
    check(
        hub.load(quantizer.save(model(), tmp_path / "awq", beside="quant_config.json")), quantizer, "int4:128:asym:fp16"
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_groups_in_the_order_of_activations_are_dense_and_said_to_be(architecture: str, tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", 4, 64, desc_act=True)
    sizes = SIZES if architecture == "llama" else {"n_embd": 128, "n_head": 4, "n_inner": 256}
    made = tiny.model(architecture, torch.float16, **sizes)
    loaded = hub.load(quantizer.save(made, tmp_path / "theirs"))
    check(loaded, quantizer, None)
    assert loaded.notes[0].startswith(f"{len(quantizer.matrices)} matrices have groups of columns in the order of")
    assert not any(isinstance(module, StoredWeight) for module in loaded.model.modules())


def test_gpt2_s_transposed_matrices(tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", 4, 64)
    made = tiny.model("gpt2", torch.float16, n_embd=128, n_head=4, n_inner=256)
    check(hub.load(quantizer.save(made, tmp_path / "theirs")), quantizer, "int4:64:asym:fp16")


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_scales_of_awq(symmetric: bool, tmp_path: Path) -> None:
    quantizer = Quantizer("awq", 4, 32, symmetric, version="gemm", zero_point=not symmetric)
    loaded = hub.load(quantizer.save(model(), tmp_path / "theirs"))
    check(loaded, quantizer, "int4:32:fp16" if symmetric else "int4:32:asym:fp16")


def test_another_reader_of_awq_gets_the_same_codes() -> None:
    converter = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    parts = Quantizer("awq", 4, 32).parts("q", torch.randn(64, 128, dtype=torch.float64))
    theirs, scale, zero = converter()._convert_gemm_module(
        parts["qweight"].contiguous(), parts["scales"], parts["qzeros"].contiguous()
    )
    place = nn.site(torch.nn.Sequential(torch.nn.Linear(128, 64)), "0")
    spec, tensors, _ = Awq({}).matrix("q", place, parts)
    size = torch.arange(128) // 32
    wanted = (theirs.float() - zero.float()[:, size]) * scale.float()[:, size]
    assert torch.equal(spec.dense(*tensors), wanted)


def test_a_saved_copy_has_the_same_numbers(tmp_path: Path) -> None:
    loaded = hub.load(Quantizer("gptq", 3, 64).save(model(), tmp_path / "theirs"))
    for folder in (
        hub.save(loaded.model, loaded.tokenizer, tmp_path / "ours"),
        hub.save_compressed(loaded.model, loaded.tokenizer, tmp_path / "compressed"),
    ):
        assert torch.equal(tiny.logits(hub.load(folder).model), tiny.logits(loaded.model))


def test_zeros_as_a_bias_where_there_is_none(tmp_path: Path) -> None:
    folder = Quantizer("gptq", 4, 64).save(model(attention_bias=False, mlp_bias=False), tmp_path / "theirs")
    wanted = tiny.logits(hub.load(folder).model)
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.bias"] = torch.zeros(256, dtype=torch.float16)
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(tiny.logits(hub.load(folder).model), wanted)
    state["model.layers.0.mlp.up_proj.bias"][7] = 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors'.*mlp\.up_proj: bias: the architecture has none"):
        hub.load(folder)


def test_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = Quantizer("gptq", 4, 64).save(model(), tmp_path / "theirs")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin' is pickled"):
        hub.load(folder)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
Q = "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[str, Change, str]] = {
    "bits": ("gptq", lambda config, state: config.update(bits=8), "of x, and the configuration says bits=8"),
    "a format": ("gptq", lambda config, state: config.update(checkpoint_format="marlin"), "'marlin'"),
    "a version": ("awq", lambda config, state: config.update(version="gemv"), "'gemv'"),
    "wide codes": ("awq", lambda config, state: config.update(bits=8), "its bits are 8"),
    "lost scales": ("gptq", lambda config, state: state.pop(f"{Q}.scales"), f"{Q}: scales: the file has"),
    "lost zeros": ("awq", lambda config, state: state.pop(f"{Q}.qzeros"), f"{Q}: qzeros: the file has"),
    "a shape": (
        "awq", lambda config, state: state.update({f"{Q}.qweight": state[f"{Q}.qweight"][1:].contiguous()}),
        f"{Q}: qweight: it is torch.int32 (127, 16), and must be torch.int32 (128, 16)",
    ),
    "groups": (
        "gptq",
        lambda config, state: state.update({
            f"{Q}.scales": torch.ones(3, 128).half(), f"{Q}.qzeros": torch.zeros(3, 16, dtype=torch.int32),
        }),
        "128 columns do not make 3 groups",
    ),
    "no groups": (
        "gptq",
        lambda config, state: state.update({
            f"{Q}.scales": torch.ones(0, 128).half(), f"{Q}.qzeros": torch.zeros(0, 16, dtype=torch.int32),
        }),
        f"{Q}: scales: it is torch.float16 (0, 128), and must be",
    ),
    "groups of another size": (
        "gptq", lambda config, state: config.update(group_size=128), "4 groups of 256 columns, and group_size=128",
    ),
    "groups of another size in AWQ": ("awq", lambda config, state: config.update(group_size=32), "group_size=32 says"),
    "a group size in words": ("gptq", lambda config, state: config.update(group_size="64"), "its group_size is '64'"),
    "bits in words": ("gptq", lambda config, state: config.update(bits="4"), "its bits are '4'; parco reads"),
    "two matrices": (
        "gptq", lambda config, state: state.update({f"{Q}.weight": torch.zeros(128, 128)}), f"{Q}: weight: the file",
    ),
    "two matrices in AWQ": (
        "awq", lambda config, state: state.update({f"{Q}.weight": torch.zeros(128, 128)}), f"{Q}: weight: the file has",
    ),
    "an order of fractions": (
        "gptq", lambda config, state: state.update({f"{Q}.g_idx": torch.full((128,), 0.5)}), "g_idx: it is torch.float",
    ),
    "a tensor of no layer": (
        "gptq", lambda config, state: state.update({"scales": torch.ones(2)}), "'scales', which is of no layer",
    ),
    "a list of methods": (
        "gptq", lambda config, state: config.update(quant_method=["gptq"]), "already quantized by ['gptq']",
    ),
    "an order": (
        "gptq", lambda config, state: state.update({f"{Q}.g_idx": torch.full((128,), 9, dtype=torch.int32)}),
        f"{Q}: g_idx: it is (128,), and must name one of 2 groups",
    ),
    "experts": (
        "gptq",
        lambda config, state: state.update({"model.layers.0.mlp.experts.0.w1.qweight": torch.zeros(1, 1).int()}),
        "LlamaForCausalLM has no such layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("settings", ["gptq", [1]])
def test_a_configuration_that_is_no_object(settings: object, tmp_path: Path) -> None:
    folder = Quantizer("gptq", 4, 64).save(model(), tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(
        ValueError, match=r"^'.*theirs/config\.json' has a quantization_config that is no object but [^\n]*$"
    ):
        hub.load(folder)


def test_a_layer_of_fewer_columns_than_a_group(tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", 4, -1)
    folder = quantizer.save(model(intermediate_size=128), tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))
    check(hub.load(folder), quantizer, "int4:128:asym:fp16")


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(what: str, tmp_path: Path) -> None:
    method, change, message = BROKEN[what]
    folder = Quantizer(method, 4, 64).save(model(), tmp_path / "theirs")
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config["quantization_config"], state)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.refused(folder, message)
