"""torch.export of models that hold stored weights: the operations stay in the graph, and the sequence may grow."""

from __future__ import annotations

import pytest
import torch
from tests.hub.tiny import VOCABULARY, model

import parco


class Logits(torch.nn.Module):
    """A model as a function of its tokens alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("method", ["int4:32", "mxfp8_e4m3"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_converted_model_exports_and_gives_the_same_logits(architecture: str, method: str) -> None:
    tiny = Logits(model(architecture))
    parco.convert_(tiny.model, parco.Quantize(method))
    tokens = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=60)}}
    with torch.no_grad():
        exported = torch.export.export(tiny, (torch.randint(0, VOCABULARY, (2, 9)),), dynamic_shapes=tokens)
        for length in (9, 23):
            ids = torch.randint(0, VOCABULARY, (2, length))
            assert torch.equal(exported.module()(ids), tiny(ids))
    called = [str(node.target) for node in exported.graph.nodes]
    assert sum(name.startswith("parco.linear_coded") for name in called) >= 8
