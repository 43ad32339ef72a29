"""Mixtures that others quantized: experts written one by one, or as gpt-oss's stacks of MXFP4."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub import tiny
from tests.hub.test_gptq import SIZES, Quantizer

from parco import hub, nn
from parco.hub import stacks
from parco.nn import Experts
from parco.weights import Quantized

NAMES = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
"""In files: of a block, and of an expert's layers."""


def mixture(architecture: str, **changes: Any) -> Any:
    sizes = {**SIZES, "moe_intermediate_size": 64} if architecture == "qwen3_moe" else SIZES
    return tiny.model(architecture, torch.float16, **{**sizes, **changes})


def write(made: Any, quantizer: Quantizer, folder: Path) -> Any:
    """Writes the model as GPTQ's libraries do, every expert's layer by itself; returns what it stands for, dense."""
    truth = copy.deepcopy(made).float()
    block, *leaves = NAMES[made.config.model_type]
    state: dict[str, torch.Tensor] = {}
    for name, tensor in made.state_dict().items():
        if "mlp.experts" not in name and not name.endswith("_proj.weight"):
            state[name.replace(".mlp.", f".{block}.")] = tensor
    for name in nn.linears(made):
        if name == "lm_head":
            continue
        place, matrix = nn.site(truth, name), nn.matrix(made, name).double()
        written = [(name, matrix)]
        if place.kind == "expert":
            parameter, index = place.expert
            path = name.partition(".mlp.")[0] + f".{block}.experts.{index}"
            halves = matrix.chunk(2) if parameter == "gate_up_proj" else (matrix,)
            written = list(zip((f"{path}.{leaf}" for leaf in leaves[2 * (len(halves) == 1) :]), halves, strict=False))
        for own, part in written:
            state |= {f"{own}.{part_name}": t.contiguous() for part_name, t in quantizer.parts(own, part).items()}
        nn.matrix(truth, name).copy_(torch.cat([quantizer.matrices[own] for own, _ in written]))
    made.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantizer.settings}))
    return truth


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("architecture", NAMES)
def test_experts_that_were_quantized_one_by_one(architecture: str, method: str, tmp_path: Path) -> None:
    truth = write(mixture(architecture), Quantizer(method, 4, 64), tmp_path / "theirs")
    loaded = hub.load(tmp_path / "theirs", torch.float32)
    experts = loaded.model.model.layers[1].mlp.experts
    assert isinstance(experts, Experts)
    assert {str(each.spec.format) for each in experts.gate_up_proj} == {"int4:64:asym:fp16"}
    assert torch.allclose(tiny.logits(loaded.model), tiny.logits(truth), atol=2e-4)
    again = hub.load(hub.save(loaded.model, loaded.tokenizer, tmp_path / "ours"))
    assert torch.equal(tiny.logits(again.model), tiny.logits(loaded.model))


def test_experts_in_the_order_of_activations_are_dense(tmp_path: Path) -> None:
    quantizer = Quantizer("gptq", 4, 64, desc_act=True)
    truth = write(mixture("qwen3_moe"), quantizer, tmp_path / "theirs")
    loaded = hub.load(tmp_path / "theirs", torch.float32)
    assert {str(each.spec.format) for each in loaded.model.model.layers[0].mlp.experts.gate_up_proj} == {"fp16"}
    assert torch.allclose(tiny.logits(loaded.model), tiny.logits(truth), atol=2e-2)


Change = Callable[[dict[str, torch.Tensor]], object]
BROKEN: dict[str, tuple[Change, str]] = {
    "half an expert": (
        lambda state: [state.pop(name) for name in list(state) if "experts.2.up_proj" in name],
        "experts.gate_up_proj[2]: the files have gate or up of this expert, and not both",
    ),
    "an expert more": (
        lambda state: state.update(
            {name.replace("experts.3", "experts.9"): t.clone() for name, t in state.items() if "experts.3.down" in name}
        ),
        "experts.9.down_proj: Qwen3MoeForCausalLM has no such layer",
    ),
    "a cut expert": (
        lambda state: state.update(
            {name: t[:-1] for name, t in state.items() if name.endswith("0.mlp.experts.3.down_proj.qweight")}
        ),
        "layers.0.mlp.experts.3.down_proj: qweight: ",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(what: str, tmp_path: Path) -> None:
    change, message = BROKEN[what]
    write(mixture("qwen3_moe"), Quantizer("gptq", 4, 64), tmp_path / "theirs")
    refused(tmp_path / "theirs", change, message)


def refused(folder: Path, change: Change, message: str) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.refused(folder, message)


def test_halves_with_a_scale_each_for_the_whole() -> None:
    matrix = torch.randn(32, 64)
    spec = Quantized("nvfp4", (32, 64))
    gate, up = spec.encode(matrix), spec.encode(matrix * 3)
    whole, tensors = stacks.joined((spec, gate), (spec, gate))
    assert torch.equal(whole.dense(*tensors), torch.cat([spec.dense(*gate)] * 2))
    plain = Quantized("fp8_e4m3:tensor", (32, 64))
    gates, ups = plain.encode(matrix), plain.encode(matrix * 3)
    by_row, codes = stacks.joined((plain, gates), (plain, ups))
    assert str(by_row) == "quantized(fp8_e4m3:row, 64x64)"
    assert torch.equal(by_row.dense(*codes), torch.cat([plain.dense(*gates), plain.dense(*ups)]))
    with pytest.raises(ValueError, match="its global_scale is another than that of the other half"):
        stacks.joined((spec, gate), (spec, up))
    with pytest.raises(ValueError, match=r"it is quantized\(mxfp4, 32x64\), and the other half quantized\(nvfp4"):
        stacks.joined((spec, gate), (Quantized("mxfp4", (32, 64)), ()))


def gpt_oss(folder: Path, **changes: Any) -> Any:
    """Writes a tiny gpt-oss as OpenAI did, of random codes; returns the dense model, by Transformers' decoding."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = tiny.model("gpt_oss", torch.bfloat16, **{"hidden_size": 64, "intermediate_size": 96, **changes})
    draw = torch.Generator().manual_seed(7)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = state.pop(name).shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(121, 125, (count, rows, columns // 32), dtype=torch.uint8, generator=draw)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        made.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales)
    made.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return made


def test_gpt_oss_is_read_as_it_was_published(tmp_path: Path) -> None:
    """Codes and scales are kept, and stand for what Transformers makes of them."""
    theirs = gpt_oss(tmp_path / "theirs")
    loaded = hub.load(tmp_path / "theirs")
    experts = loaded.model.model.layers[0].mlp.experts
    assert {str(each.spec) for each in experts.gate_up_proj} == {"quantized(mxfp4, 192x64)"}
    for name in (f"model.layers.1.mlp.experts.{parameter}[2]" for parameter in ("gate_up_proj", "down_proj")):
        assert torch.equal(nn.matrix(loaded.model, name), nn.matrix(theirs, name).float())
    assert loaded.notes == ()
    wide = hub.load(tmp_path / "theirs", torch.float32)
    assert torch.allclose(tiny.logits(wide.model), tiny.logits(theirs.float()), atol=1e-4)
    again = hub.load(hub.save(loaded.model, loaded.tokenizer, tmp_path / "ours"))
    assert torch.equal(tiny.logits(again.model), tiny.logits(loaded.model))
    fusion = nn.fuse_(loaded.model)
    assert len(fusion.fused["experts"]) == 2


G = "model.layers.0.mlp.experts.gate_up_proj"
STACKS: dict[str, tuple[Change, str]] = {
    "no scales": (lambda state: state.pop(f"{G}_scales"), f"{G}[0]: scales: the file has blocks of this layer"),
    "a stack that is cut": (
        lambda state: state.update({f"{G}_scales": state[f"{G}_scales"][:3].clone()}),
        f"{G}: scales: it is of 3 experts, and another tensor of 4",
    ),
    "other blocks": (
        lambda state: state.update({f"{G}_blocks": state[f"{G}_blocks"][..., :8].clone()}),
        f"{G}[0]: blocks: it is torch.uint8 (192, 2, 8), and must be torch.uint8 (192, 2, 16)",
    ),
    "experts more": (
        lambda state: state.update({name: torch.cat([state[name]] * 2) for name in (f"{G}_blocks", f"{G}_scales")}),
        f"{G}[4]: 'model.layers.0.mlp.experts.gate_up_proj[4]': model.layers.0.mlp.experts has the experts 0 to 3",
    ),
}


@pytest.mark.parametrize("what", STACKS)
def test_stacks_that_do_not_fit_are_named(what: str, tmp_path: Path) -> None:
    gpt_oss(tmp_path / "theirs")
    refused(tmp_path / "theirs", *STACKS[what])


def test_columns_that_are_no_whole_number_of_blocks(tmp_path: Path) -> None:
    gpt_oss(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 90}))
    refused(tmp_path / "theirs", lambda state: None, "down_proj[0]: blocks: 90 columns are no whole number of blocks")
