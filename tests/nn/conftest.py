"""What tests of fused models watch."""

from typing import Any

import pytest

from parco import _C


class Calls(list[int]):
    """How many layers each compiled call computed."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, run = Calls(), _C.run_layers

    def counted(layers: list[Any], *arguments: Any) -> None:
        found.append(len(layers))
        run(layers, *arguments)

    monkeypatch.setattr(_C, "run_layers", counted)
    return found
