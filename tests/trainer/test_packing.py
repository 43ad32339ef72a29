"""Examples in windows: none is lost or doubled, and a model says of each what it says of it alone."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.hub import tiny

from parco.fitting.stages import Silent
from parco.nn import fuse_
from parco.trainer import cached, packing
from parco.trainer.examples import IGNORED, Example
from parco.trainer.windows import collate

LENGTH = 24


def lines(path: Path, count: int = 40) -> Path:
    """Prompts and completions of many lengths; some are longer than a window, one has no answer within it."""
    made = [{"prompt": f"def f{i}(" * (1 + i % 3), "completion": f"return {i * i}" * (1 + i % 2)} for i in range(count)]
    made[3]["completion"] = "import torch\n" * 40
    made[5]["prompt"] = "class Weight:\n" * 40
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def alone(made: Any) -> list[Example]:
    """The examples of windows, each by itself, without padding."""
    found: list[Example] = []
    for row in made:
        starts = [i for i, position in enumerate(row["position_ids"].tolist()) if position == 0] + [LENGTH]
        for begin, end in itertools.pairwise(starts):
            labels = row["labels"][begin:end].tolist()
            if any(label != IGNORED for label in labels):
                found.append(Example(row["input_ids"][begin:end].tolist(), labels))
    return found


def test_every_example_is_in_one_window(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl")
    words = tiny.tokenizer()
    packed, digest = packing.windows([file], words, LENGTH, Silent())
    single, other = packing.windows([file], words, LENGTH, Silent(), packed=False)
    assert digest != other
    counts = cached.counts_of(packed)
    assert counts == cached.counts_of(single)
    assert (counts["examples"], counts["left out"]) == (39, 1) and counts["cut"] > 0
    assert len(single) == 39 and "position_ids" not in single.column_names
    assert counts["tokens"] == sum(len(each.tokens) for each in alone(packed))
    # Best fit leaves no two windows that would go into one.
    fewest = counts["tokens"] / LENGTH
    assert fewest <= len(packed) < 1.3 * fewest + 1
    bare = sorted(
        [token for token, label in zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True) if label >= 0]
        for row in single
    )
    assert bare == sorted([label for label in each.labels if label != IGNORED] for each in alone(packed))
    assert [int(row["window"]) for row in packed] == list(range(len(packed)))
    words.chat_template = "{{ messages }}"
    assert packing.windows([file], words, LENGTH, Silent())[1] != digest, "another template is other data"


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mixtral"])
def test_packed_examples_have_the_losses_that_they_have_alone(architecture: str, tmp_path: Path) -> None:
    words = tiny.tokenizer()
    packed, _ = packing.windows([lines(tmp_path / "a.jsonl", 12)], words, LENGTH, Silent())
    model = tiny.model(architecture, torch.float32, max_position_embeddings=64)
    fuse_(model)
    assert packing.keeps_apart(model)
    batch = collate(list(packed))
    assert (batch["position_ids"] == 0).sum() > len(packed) + 3, "several examples in a window"
    batch.pop("window")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        loss = model(**batch, use_cache=False).loss
        surprises: list[torch.Tensor] = []
        for row, example in ((at, each) for at in range(len(packed)) for each in alone([packed[at]])):
            tokens = torch.tensor([example.tokens])
            wanted = model(input_ids=tokens).logits[0]
            places = [
                at
                for at in range(LENGTH - len(example.tokens) + 1)
                if packed[row]["input_ids"][at : at + len(example.tokens)].tolist() == example.tokens
                and packed[row]["position_ids"][at] == 0
            ]
            got = logits[row, places[0] : places[0] + len(example.tokens)]
            # fp32 sums of a few dozen numbers below 10, in another order.
            torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
            labels = torch.tensor(example.labels)
            surprises.append(
                torch.nn.functional.cross_entropy(wanted[:-1], labels[1:], reduction="none")[labels[1:] >= 0]
            )
    torch.testing.assert_close(loss, torch.cat(surprises).mean(), atol=1e-4, rtol=1e-4)


def test_a_model_that_does_not_keep_examples_apart_is_known() -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    assert not packing.keeps_apart(transformers.MambaForCausalLM(config))


def test_what_makes_no_windows_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("import torch")
    with pytest.raises(ValueError, match=r"JSON lines \(a\.jsonl\) and other files \(b\.txt\)"):
        packing.reader([tmp_path], packed=True)
    assert packing.reader([tmp_path / "b.txt"], packed=True) is None
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "import torch\n" * 30, "completion": "a"}))
    with pytest.raises(ValueError, match=r"no example in .*c\.jsonl has an answer within 24 tokens"):
        packing.windows([tmp_path / "c.jsonl"], tiny.tokenizer(), LENGTH, Silent())
