"""convert_: one method for every matrix of a model, in place."""

import subprocess
import sys

import pytest
import torch
from tests.nn.models import logits, model

from parco.fitting.convert import convert_
from parco.fitting.methods import Factor, Quantize
from parco.nn import Embedding, Experts, Linear, StoredWeight
from parco.products import Activations


def plain() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32, bias=False))


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def test_a_plain_torch_model_is_converted_everywhere() -> None:
    made = plain()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    before = made(x)
    done = convert_(made, Quantize("int8:row"))
    assert [row.name for row in done.rows] == ["0", "2"]
    assert isinstance(made[0], Linear)
    assert isinstance(made[2], Linear)
    assert made[0].bias is not None
    assert made[2].bias is None
    assert relative(made(x), before) < 0.02
    assert done.before == (64 * 96 + 96 * 32) * 4
    assert done.after == sum(m.nbytes for m in made.modules() if isinstance(m, StoredWeight))


def test_the_product_is_chosen_with_the_method() -> None:
    made, same = plain(), plain()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    convert_(made, "int8:row", product="activations(int8)")
    convert_(same, "int8:row")
    assert made[0].weight.product == Activations()
    assert 0 < relative(made(x), same(x)) < 0.02
    with pytest.raises(ValueError, match=r"activations\(int8\); no part of dense"):
        convert_(plain(), "bf16", product=Activations())
    with pytest.raises(ValueError, match="unknown product 'int8'"):
        convert_(plain(), "int8:row", product="int8")


def test_the_conversion_prints_what_was_done() -> None:
    made = plain()
    reference = made[0].weight.detach().clone()
    done = convert_(made, "int4:32")
    lines = str(done).splitlines()
    assert len(lines) == len(done) + 2
    assert "quantized(int4:32, 96x64)" in lines[1]
    assert "2 matrices by int4:32" in lines[-1]
    assert done.rows[0].error == pytest.approx(relative(made[0].weight.dense(), reference), rel=1e-3)
    assert f"{done.after:,}" in lines[-1]


@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "gpt2", "phi3", "gpt-neox", "gemma", "qwen2-moe", "mixtral", "gpt-oss"]
)
def test_the_default_takes_the_linears_of_the_blocks(name: str) -> None:
    made = model(name)
    before = logits(made)
    done = convert_(made, "int8:row")
    assert all(".0." in row.name or ".1." in row.name for row in done.rows), "inside the blocks only"
    assert not any(row.name.endswith((".gate", "shared_expert_gate")) for row in done.rows), "routers stay"
    left = [
        n for n, m in made.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and not isinstance(m, Linear)
    ]
    assert all("head" in n or "embed_out" in n or "gate" in n for n in left)
    assert isinstance(made.get_input_embeddings(), torch.nn.Embedding)
    assert relative(logits(made), before) < 0.05


@pytest.mark.parametrize("text", ["bf16", "int4:32", "factor(0.9)", "factor(0.9)>>int8:row", "int4:32+factor(rank=16)"])
def test_every_kind_of_method_runs_in_a_model(text: str) -> None:
    made = model("llama")
    before = logits(made)
    done = convert_(made, text)
    assert len(done) == 14
    after = logits(made)
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(after, before)
    assert {str(row.spec) for row in done.rows} == {
        str(m.spec) for n, m in made.named_modules() if isinstance(m, StoredWeight) and n.endswith(".weight")
    }


def test_experts_are_converted_one_by_one() -> None:
    made = model("mixtral")
    done = convert_(made, "int8:row", lambda module, name: "experts" in name)
    assert len(done) == 2 * 2 * 5
    assert "model.layers.0.mlp.experts.gate_up_proj[3]" in [row.name for row in done.rows]
    assert isinstance(made.model.layers[0].mlp.experts, Experts)
    one = model("mixtral")
    done = convert_(one, "int8:row", lambda module, name: name.endswith("layers.1.mlp.experts.down_proj[2]"))
    assert len(done) == 1
    assert done.before == 48 * 88 * 4


def test_a_tied_matrix_is_converted_once_for_all_who_share_it() -> None:
    made = model("llama tied", torch.bfloat16)
    asked: list[str] = []

    def head_only(module: torch.nn.Module, name: str) -> bool:
        asked.append(name)
        return name == "lm_head"

    done = convert_(made, Quantize("int8:row"), head_only)
    assert len(done) == 1
    assert "model.embed_tokens" in asked
    assert isinstance(made.lm_head, Linear)
    assert isinstance(made.model.embed_tokens, Embedding)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert done.before == 101 * 48 * 2
    assert logits(made).dtype == torch.bfloat16


def test_filter_fn_chooses_embeddings_and_sees_the_module() -> None:
    made = model("llama")
    done = convert_(made, "int8:row", lambda module, name: isinstance(module, torch.nn.Embedding))
    assert [row.name for row in done.rows] == ["model.embed_tokens"]
    assert isinstance(made.lm_head, torch.nn.Linear), "not tied, so the head stays"


def test_what_is_stored_in_few_bits_is_left_alone_by_default() -> None:
    made = plain()
    convert_(made, "bf16")
    convert_(made, "int4:32", lambda module, name: name == "0")
    done = convert_(made, "int8:row")
    assert [row.name for row in done.rows] == ["2"]
    assert done.before == 96 * 32 * 2, "the bf16 copy was what it had"
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_(made, "int8:row")
    again = convert_(made, Factor(rank=4), lambda module, name: name == "0")
    assert again.before == 96 * 64 // 2 + 96 * 2 * 2


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to convert in Sequential: filter_fn accepted none of its 2 matrices"):
        convert_(plain(), "int8:row", lambda module, name: False)
    with pytest.raises(ValueError, match="nothing to convert in ReLU"):
        convert_(torch.nn.ReLU(), "int8:row")
    with pytest.raises(ValueError, match="wrap it in a module"):
        convert_(torch.nn.Linear(4, 4), "int8:row")
    with pytest.raises(ValueError, match="known are keep"):
        convert_(plain(), "int9000")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        convert_("gpt2", "int8:row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs statistics"):
        convert_(plain(), "int4:32@gptq")


KEEPS_NOTHING = """
import torch
from pathlib import Path
from parco import machine
from parco.fitting.convert import convert_
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, dtype=torch.bfloat16) for _ in range(24)))
convert_(model, "int4:32")
before = resident()
machine.release_memory()
print(before - resident())
"""


def test_memory_of_what_was_stored_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", KEEPS_NOTHING], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 4e6  # of 50 MB; 20 to 60 where convert_ keeps it
