"""Merging: the merged folder says what model and adapter said together, and nothing is rounded unasked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub import tiny

from parco import adapters, hub
from parco.cli import main
from parco.fitting.stages import Silent
from parco.trainer import merge


def adapter(model: Any, folder: Path, method: str = "lora(4)") -> Path:
    """An adapter of `model` that changes what it says."""
    adapters.add_(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapters.save(model, folder)
    return folder


@pytest.mark.parametrize(("architecture", "method"), [("llama", "lora(4)"), ("gpt2", "dora(4)"), ("qwen3", "vera(8)")])
def test_a_dense_model_says_what_it_said_with_the_adapter(architecture: str, method: str, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", architecture, dtype=torch.float32)
    model = hub.load(base).model
    place = adapter(model, tmp_path / "adapter", method)
    done = merge(base, place, tmp_path / "merged", Silent())
    assert (done["stored"], done["before"], done["windows"]) == (False, None, 0)
    merged = hub.load(tmp_path / "merged").model
    assert "quantization_config" not in merged.config.to_dict()
    with torch.no_grad():
        before = hub.load(base).model(tiny.inputs()).logits
        wanted, got = model(tiny.inputs()).logits, merged(tiny.inputs()).logits
    # fp32 sums of a few dozen terms in another order, through two blocks.
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - before).abs().max() > 0.01
    assert hub.load(tmp_path / "merged").tokenizer("import torch") == tiny.tokenizer()("import torch")


def test_a_stored_model_is_rounded_anew_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.save(tiny.store(tiny.model("llama"), "int8:row", None), tiny.tokenizer(), tmp_path / "base")
    place = adapter(hub.load(tmp_path / "base").model, tmp_path / "adapter")
    text = tmp_path / "text.txt"
    text.write_text("def fit(model, size):\n    return model\n" * 60)
    words = ["merge", str(tmp_path / "base"), str(place), "--out", str(tmp_path / "merged"), "--data", str(text)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "has stored weights" in said and "--requantize" in said and said.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    assert main([*words, "--requantize"]) == 0
    shown = capsys.readouterr().out
    assert "what storing anew costs" in shown and "nats per token" in shown
    done = merge(tmp_path / "base", place, tmp_path / "again", Silent(), requantize=True, text=text.read_text())
    assert done["before"] is not None and done["after"] is not None and done["windows"] > 1
    assert done["before"] != done["after"]
    merged = hub.load(tmp_path / "merged").model
    stored = {name for name, _ in merged.named_parameters() if name.endswith("codes")}
    assert stored == {
        name for name, _ in hub.load(tmp_path / "base").model.named_parameters() if name.endswith("codes")
    }


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.folder(tmp_path / "base")
    place = adapter(hub.load(base).model, tmp_path / "adapter")
    other = tiny.folder(tmp_path / "other", hidden_size=48, num_attention_heads=4)
    narrow = adapter(hub.load(base).model, tmp_path / "narrow", "bottleneck(4)")
    cut = adapter(hub.load(base).model, tmp_path / "cut")
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    capsys.readouterr()
    for model, given, out, wrong in (
        (other, place, "out", "is for another model: tensor 'base_model.model.model.layers.0."),
        (base, narrow, "out", "bottleneck(4)"),
        (base, cut, "out", "adapter_model.safetensors"),
        (base, tmp_path / "mine", "out", "it has no adapter_config.json"),
        (base, tmp_path / "absent", "out", "no folder"),
        (base, place, "mine", "holds files that parco did not save"),
    ):
        assert main(["merge", str(model), str(given), "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert wrong in said and said.count("\n") == 1, said
        assert not (tmp_path / "out").exists()
