"""fuse_loss_ on Transformers' models: the same loss and gradients, without logits."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_loss import Largest
from tests.nn.models import CONFIGS, model, tokens
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from parco.nn import fuse_
from parco.training import fuse_loss_, prepare_
from parco.training.loss import PendingLogits

LABELS = tokens().clone()
LABELS[0, :4] = -100


def step(made: nn.Module, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output and the gradients of one batch."""
    made.zero_grad()
    torch.manual_seed(3)  # dropouts
    output = made(input_ids=tokens(), labels=LABELS, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_equal(mine: tuple[Any, dict[str, Tensor]], theirs: tuple[Any, dict[str, Tensor]], slack: float) -> None:
    torch.testing.assert_close(mine[0].loss, theirs[0].loss, rtol=slack, atol=0)
    assert set(mine[1]) == set(theirs[1])
    # Some gradients cancel to nothing but roundings, such as that of a bias of keys: a share of the whole covers these.
    whole = torch.stack([grad.norm() for grad in theirs[1].values()]).norm()
    for name, grad in theirs[1].items():
        assert (mine[1][name] - grad).norm() <= slack * (grad.norm() + whole / 100), name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_trains_as_before(name: str) -> None:
    plain = model(name).train()
    if name == "gemma2":
        plain.config.final_logit_softcapping = 2.0
    fused = fuse_loss_(copy.deepcopy(plain))
    assert type(fused).__name__ == type(plain).__name__
    assert isinstance(fused, type(plain))
    for options in ({}, {"num_items_in_batch": torch.tensor(11)}):
        mine, theirs = step(fused, **options), step(plain, **options)
        assert mine[0].logits is None
        assert theirs[0].logits is not None
        assert_equal(mine, theirs, 2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(step(fused), step(plain), 3e-2)


def test_evaluation_and_calls_without_labels_are_unchanged() -> None:
    plain = model("gemma2").train()
    fused = fuse_loss_(copy.deepcopy(plain))
    assert torch.equal(fused(tokens()).logits, plain(tokens()).logits)
    with torch.no_grad():
        assert torch.equal(fused(tokens(), labels=LABELS).logits, plain(tokens(), labels=LABELS).logits)
    plain.eval(), fused.eval()
    mine, theirs = fused(tokens(), labels=LABELS), plain(tokens(), labels=LABELS)
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.loss, theirs.loss)
    generated = fused.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, plain.generate(tokens(), max_new_tokens=3, do_sample=False))


def test_in_evaluation_where_that_is_asked_for() -> None:
    made = model("gemma2").eval()
    with torch.no_grad():
        wanted = made(tokens(), labels=LABELS).loss
        output = fuse_loss_(made, evaluation=True)(tokens(), labels=LABELS)
        assert output.logits is None
        assert output.loss == pytest.approx(wanted.item(), rel=1e-6)
        assert made(tokens()).logits is not None
        assert fuse_loss_(made)(tokens(), labels=LABELS).logits is not None


def test_other_ways_to_call() -> None:
    plain = model("llama").train()
    fused = fuse_loss_(copy.deepcopy(plain))
    wanted = step(plain)[0].loss
    torch.testing.assert_close(fused(tokens(), None, None, None, None, LABELS).loss, wanted)
    found = fused(tokens(), labels=LABELS, return_dict=False)
    torch.testing.assert_close(found[0], wanted)
    assert not any(isinstance(each, PendingLogits) for each in found)
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(fused(tokens(), labels=LABELS, shift_labels=shifted).loss, wanted)
    with_states = fused(tokens(), labels=LABELS, output_hidden_states=True)
    assert len(with_states.hidden_states) == 3


def test_the_logits_are_never_whole() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=20000, **sizes)).train()
    ids = torch.randint(0, 20000, (4, 512))
    fused = fuse_loss_(copy.deepcopy(plain))
    seen = []
    for made in (plain, fused):
        with Largest() as largest:
            made(ids, labels=ids).loss.backward()
        seen.append(largest.numbers)
    assert seen[0] == 4 * 512 * 20000
    assert seen[1] < seen[0] / 4


def test_copies_pickles_state_and_twice() -> None:
    plain = model("llama tied").train()
    fused = fuse_loss_(copy.deepcopy(plain))
    assert fuse_loss_(fused) is fused
    assert set(fused.state_dict()) == set(plain.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert_equal(step(other), step(plain), 2e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    fused = fuse_loss_(model("llama").train())
    fused.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert_equal(step(fused), step(again), 2e-5)
    assert again.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("first", ["fused", "prepared"])
def test_prepared_heads(first: str) -> None:
    """In whichever order: a head's products are bf16's or fp16's, those of a layer prepared under the recipe."""
    for recipe, slack in (("bf16", 2e-2), ("mxfp8", 0.15)):
        plain = model("llama").train()
        prepare_(plain, recipe)
        fused = model("llama").train()
        for change in (fuse_loss_, lambda made, recipe=recipe: prepare_(made, recipe))[
            :: 1 if first == "fused" else -1
        ]:
            change(fused)
        mine, theirs = step(fused), step(plain)
        assert mine[0].logits is None
        # Both round x, W and the derivative to bf16, and one of them the logits as well: from there the layers before
        # see other numbers, some of which fp8 rounds to a neighbour, an eighth away.
        assert_equal(mine, theirs, slack)
    prepare_(fused, "int8", lambda module, name: name == "lm_head")
    with pytest.raises(ValueError, match="lm_head is prepared under int8"):
        step(fused)
    prepared = model("llama")
    prepare_(prepared, "int8", lambda module, name: name == "lm_head")
    with pytest.raises(ValueError, match="lm_head is prepared under int8"):
        fuse_loss_(prepared)


def test_with_norms_gates_and_rotations_fused_under_autocast() -> None:
    plain = model("llama").train()
    fused = copy.deepcopy(plain)
    prepare_(fused, "bf16")
    found = fuse_(fused)
    assert {"norm", "gate", "rotation"} <= set(found.fused)
    fuse_loss_(fused)
    with torch.autocast("cpu", torch.bfloat16):
        norm = fused.model.layers[0].input_layernorm
        assert norm(torch.randn(3, 48)).dtype == torch.bfloat16
        assert_equal(step(fused), step(plain), 3e-2)
    assert norm(torch.randn(3, 48)).dtype == torch.float32


def test_gradient_checkpointing() -> None:
    plain = model("qwen3").train()
    fused = fuse_loss_(copy.deepcopy(plain))
    fused.gradient_checkpointing_enable()
    assert_equal(step(fused), step(plain), 2e-5)


def test_compiled_by_torch() -> None:
    plain = model("llama").train()
    fused = fuse_loss_(copy.deepcopy(plain))
    compiled: Any = torch.compile(fused, backend="aot_eager")
    output = compiled(input_ids=tokens(), labels=LABELS)
    assert output.logits is None
    output.loss.backward()
    found = output, {name: p.grad.clone() for name, p in fused.named_parameters()}
    assert_equal(found, step(plain), 2e-5)


def test_trainer_with_accumulation_and_evaluation(tmp_path: Path) -> None:
    texts = [{"input_ids": row, "labels": row} for row in torch.randint(3, 101, (12, 9))]
    results = []
    for fuse in (False, True):
        made = model("llama").train()
        if fuse:
            fuse_loss_(made)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(fuse)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=3,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(made, arguments, train_dataset=texts, eval_dataset=texts)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append([*losses, trainer.evaluate()["eval_loss"]])
    assert results[1] == pytest.approx(results[0], rel=1e-4)


class Own(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def replaced() -> nn.Module:
    made = model("llama")
    made.forward = made.forward
    return made


def headless() -> nn.Module:
    made = model("llama")
    made.lm_head = nn.Sequential(nn.Linear(48, 101))
    return made


def with_other_loss() -> nn.Module:
    made = model("llama")
    made.loss_function = nn.functional.cross_entropy
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "has no output head"),
        (lambda: model("llama").model, "has no output head"),
        (lambda: Own(LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)), "does not hand"),
        (lambda: AutoModelForMaskedLM.from_config(BertConfig(hidden_size=24, num_hidden_layers=1)), "does not hand"),
        (replaced, "forward of this LlamaForCausalLM has been replaced"),
        (headless, "is a Sequential; nn.Linear is needed"),
        (with_other_loss, "has the loss cross_entropy"),
    ],
)
def test_what_cannot_be_fused_is_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fuse_loss_(make())


def test_only_modules() -> None:
    with pytest.raises(TypeError, match="got str"):
        fuse_loss_("llama")  # type: ignore[arg-type]


def test_what_models_may_do_with_pending_logits() -> None:
    head, x = nn.Linear(8, 13), torch.randn(5, 8, requires_grad=True)
    labels = torch.tensor([0, 12, 3, -100, 4])
    pending: Any = PendingLogits(head, None, x)
    capped = 4.0 * torch.tanh(pending.float() * 0.5 / 4.0)
    z = 4.0 * torch.tanh(head(x) * 0.5 / 4.0)
    torch.testing.assert_close(capped.cross_entropy(labels, -100, None), nn.functional.cross_entropy(z, labels))
    bounded = torch.tanh(pending / 3)
    z = torch.tanh(head(x) / 3)
    torch.testing.assert_close(bounded.cross_entropy(labels, -100, None), nn.functional.cross_entropy(z, labels))
    for wrong in (
        lambda: torch.softmax(pending, -1),
        lambda: pending[:, :3],
        lambda: capped * 2,
        lambda: pending.shape,
    ):
        with pytest.raises((NotImplementedError, TypeError)):
            wrong()
