"""parco.convert_ at the top level: a converted Transformers model saves itself whole."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import parco


def test_a_converted_model_saves_itself(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    done = parco.convert_(model, "int4:32")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 64, (1, 9))
    assert len(done) == 14
    assert str(again.model.layers[1].mlp.up_proj.weight.spec) == "quantized(int4:32, 96x48)"
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_plain_modules_are_converted_too():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
    assert parco.convert_(model, parco.Quantize("int8:row")).rows[0].after == 32 * 64 + 32 * 4
