"""What calibration collects is what a plain forward and backward give, and it predicts what a change costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import small
from tests.fitting.conftest import EXTENT, Calibrated
from torch import nn

from parco.fitting import calibrate
from parco.fitting.observe import Energies, observed
from parco.fitting.stages import Silent, Stages
from parco.fitting.stream import Stream
from parco.nn import groups, matrix

OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32, "tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56, "sliding_window": 8},
    # Its blocks return tuples.
    "gpt_neo": {
        "num_hidden_layers": 5,
        "attention_types": [[["global", "local"], 2], [["global"], 1]],
        "window_size": 8,
    },
}


@pytest.mark.parametrize("architecture", OTHERS)
@torch.no_grad()
def test_a_stream_computes_what_the_model_does_and_leaves_it_as_it_was(architecture: str) -> None:
    model = small.model(architecture, **OTHERS[architecture])
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    tokens = torch.randint(0, small.VOCABULARY, (3, 20))
    stream = Stream(model)
    hidden = stream.enter(tokens)
    for index in range(len(stream.names)):
        with stream.block(index) as run:
            hidden = run(hidden)
    logits = stream.leave(hidden)
    assert torch.equal(Stream(model).leave(hidden), logits)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    torch.testing.assert_close(logits, model.float()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_the_inputs_in_a_plain_forward(calibrated: Calibrated) -> None:
    model = calibrated.model().float()
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(member).register_forward_hook(
            lambda _m, args, _o, member=member: seen.update({member: args[0]})
        )
        for group in groups(model)
        for member in group.members
        if group.kind != "embed"
    ]
    with torch.no_grad():
        model(calibrated.windows.calibration[: EXTENT.statistics])
    for handle in handles:
        handle.remove()
    for group in groups(model):
        for member, statistics in calibrate.statistics_of(calibrated.stage, group).items():
            inputs = seen[member].reshape(-1, statistics.columns)
            assert statistics.count == inputs.shape[0]
            torch.testing.assert_close(statistics.gram, inputs.T @ inputs, rtol=1e-3, atol=1e-2)
            assert statistics.magnitude is not None and statistics.fisher is not None
            torch.testing.assert_close(statistics.magnitude, inputs.abs().sum(0), rtol=1e-3, atol=1e-2)
            assert statistics.peak is not None
            torch.testing.assert_close(statistics.peak, inputs.abs().amax(0), rtol=1e-3, atol=1e-3)
            assert statistics.fisher.shape == (statistics.columns,)
            assert statistics.row_energy is not None and statistics.row_energy.shape == (
                matrix(model, member).shape[0],
            )


def test_fisher_information_is_the_squared_gradient_of_each_windows_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    layer, windows = nn.Linear(6, 4), torch.randn(3, 5, 6, generator=generator)
    energies = Energies()
    expected = torch.zeros(6)
    for batch in (windows[:2], windows[2:]):
        output = layer(batch)
        energies.see("layer", batch, output)
        output.sin().sum().backward()
    for window in windows:
        (grad,) = torch.autograd.grad(layer(window).sin().sum(), layer.weight)
        expected += grad.square().sum(0)
    torch.testing.assert_close(energies.mean(1)["fisher/layer"], expected)


def test_energy_of_the_head_is_the_variance_of_its_own_labels(calibrated: Calibrated) -> None:
    """The Fisher information of a logit is p(1 − p); labels drawn from the model estimate it."""
    model = calibrated.model().float()
    with torch.no_grad():
        p = torch.softmax(model(calibrated.windows.calibration[: EXTENT.energy]).logits, -1)
    head = next(group for group in groups(model) if group.kind == "head")
    energy = calibrate.statistics_of(calibrated.stage, head)["lm_head"].row_energy
    assert energy is not None
    assert float(energy.sum()) == pytest.approx(float((p * (1 - p)).mean((0, 1)).sum()), rel=0.15)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("model.layers.0.self_attn.v_proj", 4.0), ("model.layers.1.mlp.down_proj", 2.0), ("lm_head", 2.0)],
)
def test_the_prediction_is_close_to_the_measured_divergence(calibrated: Calibrated, name: str, factor: float) -> None:
    """1/2 Σ E[g²] E[e²] against the KL of a small random change. Attention adds up the errors of many values, which a
    change common to all tokens correlates, and the prediction leaves correlations out: hence the wider factor there."""
    model = calibrated.model().float()
    tokens = calibrated.windows.calibration[: EXTENT.statistics]
    group = next(group for group in groups(model) if name in group.members)
    statistics = calibrate.statistics_of(calibrated.stage, group)[name]
    weight = model.get_submodule(name).weight.data
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.02 * weight.std()
    squares = (change @ statistics.gram * change).sum(1) / statistics.count
    assert statistics.row_energy is not None
    predicted = 0.5 * float((squares * statistics.row_energy).sum())
    with torch.no_grad():
        before = torch.log_softmax(model(tokens).logits.double(), -1)
        weight += change
        after = torch.log_softmax(model(tokens).logits.double(), -1)
    measured = float(nn.functional.kl_div(after, before, reduction="sum", log_target=True)) / tokens.numel()
    assert measured / factor < predicted < measured * factor


def test_a_resumed_calibration_equals_an_uninterrupted_one(calibrated: Calibrated, tmp_path: Path) -> None:
    class Dies(Silent):
        left = 0

        def advance(self, n: int = 1) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with Stages(tmp_path, Silent()) as stages:
        stage = stages.open("calibrate")
        # Forward: two blocks, head; backward: head, two blocks.
        for left in (1, 2, 3):
            progress = Dies()
            progress.left = left
            with pytest.raises(KeyboardInterrupt):
                calibrate.calibrate(calibrated.model(), calibrated.windows, EXTENT, 0, stage, progress)
            assert not stage.whole
        calibrate.calibrate(calibrated.model(), calibrated.windows, EXTENT, 0, stage, Silent())
        names = sorted(path.name for path in stage.folder.glob("*.safetensors"))
        assert names == sorted(path.name for path in calibrated.stage.folder.glob("*.safetensors"))
        for name in names:
            again = stage.read_tensors(name.removesuffix(".safetensors"))
            for key, tensor in calibrated.stage.read_tensors(name.removesuffix(".safetensors")).items():
                assert torch.equal(tensor, again[key]), (name, key)


def test_experts_are_seen_one_by_one_and_compute_the_same() -> None:
    model = small.model("mixtral", dtype=torch.float32, **OTHERS["mixtral"])
    tokens = torch.randint(0, small.VOCABULARY, (2, 16))
    seen: dict[str, int] = {}

    def see(member: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        torch.testing.assert_close(outputs, inputs @ matrix(model, member).T)
        seen[member] = seen.get(member, 0) + inputs.shape[0]

    with torch.no_grad():
        expected = model(tokens).logits
        with observed(model, [group for group in groups(model) if group.kind.startswith("experts")], see):
            torch.testing.assert_close(model(tokens).logits, expected)
    per_kind = [
        sum(n for name, n in seen.items() if name.startswith("model.layers.0") and kind in name)
        for kind in ("gate_up", "down")
    ]
    assert per_kind == [2 * tokens.numel()] * 2


def test_a_model_whose_blocks_see_the_text_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    """Embeddings of the tokens at every block, as Gemma 4 has them: a stream would hand all windows those of one."""
    model = calibrated.model()

    class Takes(type(model.model.layers[1])):
        def forward(self, hidden_states: torch.Tensor, extra: torch.Tensor, **rest: Any) -> Any:
            return super().forward(hidden_states + 3 * extra.roll(1, -1), **rest)

    with Stages(tmp_path, Silent()) as stages:
        calibrate.calibrate(model, calibrated.windows, EXTENT, 0, stages.open("plain"), Silent())
        for layer in model.model.layers:
            layer.__class__ = Takes
        forward = model.model.forward
        model.model.forward = lambda input_ids, **rest: forward(
            input_ids=input_ids, extra=model.get_input_embeddings()(input_ids), **rest
        )
        with pytest.raises(ValueError, match="LlamaForCausalLM cannot be fitted: run block by block"):
            calibrate.calibrate(model, calibrated.windows, EXTENT, 0, stages.open("strange"), Silent())
