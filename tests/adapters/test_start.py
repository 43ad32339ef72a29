"""How factors begin: PiSSA, LoftQ, EVA."""

import copy
import pickle

import peft
import pytest
import torch
from tests.adapters.models import moved
from tests.nn.models import logits, model, tokens

import parco
from parco import adapters


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pissa_takes_the_leading_directions_out_of_the_base(name):
    made = model(name)
    plain = logits(made)
    path = "model.layers.0.mlp.up_proj" if name == "llama" else "transformer.h.0.mlp.c_fc"
    before = parco.nn.matrix(made, path).clone()
    adapters.add_(made, "lora(4, alpha=8, init=pissa)")
    torch.testing.assert_close(logits(made), plain, rtol=0, atol=5e-5)
    left, values, right = torch.linalg.svd(before.double(), full_matrices=False)
    leading = (left[:, :4] * values[:4]) @ right[:4]
    layer = made.get_submodule(path)
    own = layer.adapters["default"]
    torch.testing.assert_close(2.0 * (own.lora_B @ own.lora_A).double(), leading, rtol=0, atol=1e-5)
    torch.testing.assert_close(parco.nn.matrix(made, path).double(), before.double() - leading, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"init=pissa changes the matrix of .*, on which another adapter stands"):
        adapters.add_(made, "lora(4, init=pissa)", name="second")
    stored = model("llama")
    parco.convert_(stored, parco.Quantize("int4:32"))
    with pytest.raises(ValueError, match=r"init=pissa takes the matrix of .*q_proj apart, which is no dense one"):
        adapters.add_(stored, "lora(4, init=pissa)")


def test_pissa_in_16_bits_comes_back_here_and_in_peft(tmp_path):
    made = model("llama")
    adapters.add_(made, "lora(4, alpha=8, init=pissa)", dtype=torch.bfloat16)
    expected = logits(moved(made))
    adapters.save(made, tmp_path / "saved")
    again = model("llama")
    adapters.load_(again, tmp_path / "saved")
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(parco.nn.matrix(again, path), parco.nn.matrix(made, path))
    theirs = peft.PeftModel.from_pretrained(model("llama"), tmp_path / "saved").eval()
    for found in (logits(again), logits(theirs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_loftq_trains_the_correction_of_a_matrix_in_few_bits():
    made = model("llama")
    dense = logits(made)
    plain = model("llama")
    parco.convert_(plain, parco.Quantize("int4:32"))
    with pytest.raises(ValueError, match=r"loftq takes over .* has none of rank 16: convert the model first"):
        adapters.add_(plain, "lora(16, init=loftq)")
    parco.convert_(made, parco.Quantize("int4:32") + parco.Factor(rank=16))
    corrected = logits(made)
    assert (corrected - dense).norm() < (logits(plain) - dense).norm()
    adapters.add_(made, "lora(16, alpha=4, init=loftq)")
    torch.testing.assert_close(logits(made), corrected, rtol=0, atol=5e-4)
    layer = made.model.layers[0].self_attn.q_proj
    assert str(layer.weight.spec) == "quantized(int4:32, 48x48)"
    assert layer.adapters["default"].lora_A.requires_grad
    norms = [each.norm().item() for each in layer.adapters["default"].parameters()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_loftq_adapter_loads_over_the_base_that_lacks_its_correction(tmp_path):
    def stored(correction=None):
        made = model("llama")
        parco.convert_(made, parco.Quantize("int4:32") + correction if correction else parco.Quantize("int4:32"))
        return made

    made = stored(parco.Factor(rank=4))
    adapters.add_(made, "dora(4, init=loftq)", ["q_proj", "down_proj"])
    moved(made)
    adapters.save(made, tmp_path / "once")
    expected = logits(made)
    bare = copy.deepcopy(made)
    adapters.remove_(bare, "default")
    for folder in ("once", "twice"):  # what is loaded and saved again is known for what it is too
        for other in (model("llama"), stored(parco.Factor(rank=4))):
            before = logits(other)
            with pytest.raises(ValueError, match=r"init=loftq: the adapter holds what rounding model\.layers\.0\."):
                adapters.load_(other, tmp_path / folder)
            assert torch.equal(logits(other), before) and not adapters.names(other)
        again = copy.deepcopy(bare)
        adapters.load_(again, tmp_path / folder)
        assert torch.equal(logits(again), expected)
        adapters.save(again, tmp_path / "twice")


def test_eva_reads_the_leading_directions_of_the_inputs():
    made = model("llama")
    plain = logits(made)
    layer = made.model.layers[1].mlp.down_proj
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().reshape(-1, 88)))
    batches = [tokens(), {"input_ids": tokens(3, 12)}]
    made(batches[0]), made(**batches[1])
    handle.remove()
    made.train()
    adapters.add_(made, "lora(4, init=eva)", inputs=batches)
    assert made.training and layer.training
    assert torch.equal(logits(made.eval()), plain)
    a = layer.adapters["default"].lora_A.detach().double()
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    rows = torch.cat(seen).double()
    energy = torch.linalg.svdvals(rows).square()
    assert (rows @ a.T).square().sum() == pytest.approx(energy[:4].sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="give inputs="):
        adapters.add_(model("llama"), "lora(4, init=eva)")


def test_vera_shares_its_random_factors():
    made = model("llama")
    adapters.add_(made, "vera(8)")
    moved(made)
    own = [module.adapters["default"] for module in made.modules() if "adapters" in module._modules]
    assert not any("vera_A" in name for name in made.state_dict())
    expected = logits(made)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(made).double())).float()
    torch.testing.assert_close(logits(twin), expected)
    for each in (made, twin):
        found = [tensor for module in each.modules() for tensor in module._buffers.values() if tensor is not None]
        held = {tensor.data_ptr() for tensor in found if tensor.shape in ((8, 88), (88, 8))}
        assert len(held) == 2
    other = model("llama")
    adapters.add_(other, "vera(8, seed=1)")
    first = other.model.layers[0].self_attn.q_proj.adapters["default"]
    assert not torch.equal(first.shared.vera_A, own[0].shared.vera_A)
