"""PEFT is the oracle: the same adapter gives the same logits there and here, in both directions."""

import json

import peft
import pytest
import torch
import transformers
from tests.adapters.models import moved
from tests.nn.models import COMMON, logits, model, tokens

from parco import adapters

TOLERANCE = 1e-5
"""Of logits of a few units in fp32, which sums in another order change by some 1e-6."""

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2 tied": "all-linear"}

LORA = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.1.*down_proj": 2, "h.0.attn.c_proj": 3},
        "alpha_pattern": {"layers.0.*": 16.0, "h.*.c_attn": 2},
    },
    "pissa": {"init_lora_weights": "pissa"},
    "modules": {"modules_to_save": ["lm_head"]},
}

OURS = {
    "lora": ("lora(4, alpha=8)", {}),
    "rslora": ("lora(4, alpha=16, scaling=rslora)", {}),
    "dora": ("dora(4, alpha=2)", {}),
    "patterns": ("lora(4)", {"rank_pattern": {".*(1|attn).*proj": 2}, "alpha_pattern": {".*(v_proj|c_attn)": 16}}),
    "pissa": ("lora(4, init=pissa)", {}),
    "modules": ("lora(4)", {"modules_to_save": ["lm_head"]}),
    "vera": ("vera(8)", {}),
}


def by_peft(name, config):
    return moved(peft.get_peft_model(model(name), config)).eval()


@pytest.mark.parametrize("variant", [*LORA, "vera"])
@pytest.mark.parametrize("name", TARGETS)
def test_what_peft_saved_gives_its_logits(name, variant, tmp_path):
    if variant == "vera":
        config = peft.VeraConfig(r=8, target_modules=["q_proj", "up_proj", "c_attn"], fan_in_fan_out=name == "gpt2")
    else:
        config = peft.LoraConfig(r=4, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **LORA[variant])
    theirs = by_peft(name, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model(name)
    plain = logits(ours)
    adapters.load_(ours, tmp_path / "theirs")
    assert (logits(theirs) - plain).abs().max() > 0.03
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=TOLERANCE)
    adapters.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("name", TARGETS)
def test_what_parco_saved_gives_its_logits_in_peft(name, variant, tmp_path):
    text, options = OURS[variant]
    ours = model(name)
    added = adapters.add_(ours, text, **options)
    moved(ours)
    adapters.save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=TOLERANCE)
    again = model(name)
    loaded = adapters.load_(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))
    assert {path: str(method) for path, method in loaded.methods.items()} == {
        path: str(method) for path, method in added.methods.items()
    }
    assert loaded.copies == added.copies


def classifier():
    """RoBERTa with its head of two layers, `classifier.dense` and `classifier.out_proj`."""
    torch.manual_seed(0)
    config = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**config, num_labels=3)).eval()


def test_a_copied_module_may_hold_others(tmp_path):
    ours = classifier()
    plain = logits(ours)
    adapters.add_(ours, "lora(4)", ["query", "value"], modules_to_save=["classifier"])
    moved(ours)
    adapters.save(ours, tmp_path / "ours")
    again = classifier()
    assert adapters.load_(again, tmp_path / "ours").copies == ("classifier",)
    assert torch.equal(logits(again), logits(ours))
    assert (logits(ours) - plain).abs().max() > 0.03
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=TOLERANCE)

    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")  # which copies the head
    theirs = moved(peft.get_peft_model(classifier(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = classifier()
    assert adapters.load_(loaded, tmp_path / "theirs").copies == ("classifier",)
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=0, atol=TOLERANCE)


def test_the_files_say_what_peft_says(tmp_path):
    ours = model("llama")
    adapters.add_(ours, "dora(4, alpha=8, dropout=0.1, scaling=rslora)", ["v_proj"], rank_pattern={"1.self_attn.*": 2})
    adapters.save(ours, tmp_path / "ours", extra={"note.txt": "kept"})
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout) == (4, 8, 0.1)
    assert theirs.use_dora and theirs.use_rslora and not theirs.fan_in_fan_out
    assert set(theirs.target_modules) == {"v_proj"}
    assert config["rank_pattern"] == {r"model\.layers\.1\.self_attn\.v_proj": 2}
    assert config["task_type"] == "CAUSAL_LM"
    assert (tmp_path / "ours" / "note.txt").read_text() == "kept"


def test_a_bottleneck_has_a_type_of_its_own(tmp_path):
    ours = model("gpt2")
    adapters.add_(ours, "bottleneck(8, placement=parallel, activation=silu, factor=2.0)", ["c_fc"])
    moved(ours)
    adapters.save(ours, tmp_path / "ours")
    again = model("gpt2")
    assert str(next(iter(adapters.load_(again, tmp_path / "ours").methods.values()))).startswith("bottleneck(8, ")
    assert torch.equal(logits(again), logits(ours))
    with pytest.raises(KeyError, match="PARCO_BOTTLENECK"):
        peft.PeftModel.from_pretrained(model("gpt2"), tmp_path / "ours")


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_training_goes_the_way_that_it_goes_in_peft(variant, tmp_path):
    theirs = peft.get_peft_model(model("llama"), peft.LoraConfig(r=4, target_modules="all-linear", **LORA[variant]))
    theirs.save_pretrained(tmp_path)
    ours = model("llama")
    adapters.load_(ours, tmp_path, trainable=True)
    losses = []
    for made in (ours, theirs):
        optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = made(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
