"""Searched scales of formats that are no integers along rows: never worse than the format's own, and near the best that
there is where every scale can be tried.
"""

from __future__ import annotations

import pytest
import torch
from tests.fitting.test_levels import NAMES

from parco import formats
from parco.fitting.scales import searched
from parco.kernels.cast import decode, encode
from parco.kernels.cast.tiles import block_sum

SCALED = [name for name in NAMES if not isinstance(formats.parse(name).scale, formats.Unscaled)]
GAINS = {"nvfp4": 0.8, "mxfp4": 0.95, "nf4:64": 0.9, "ternary": 0.8, "ternary:row": 0.8, "int4:32x32": 0.6}
"""Of the squared error under the format's own scales, for normal numbers: at most what is left."""


def errors(x: torch.Tensor, name: str, scales: dict[str, torch.Tensor], importance: torch.Tensor | None = None):
    """Of every block."""
    form = formats.parse(name)
    residual = (x - decode(encode(x, form, **scales))).square()
    return block_sum(residual if importance is None else residual * importance, form.block)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", SCALED)
def test_no_block_errs_more_than_under_its_own_scale(name: str, weighed: bool) -> None:
    x = torch.randn(40, 150, generator=torch.Generator().manual_seed(0)) * 0.02
    x[3] = 0.0
    importance = torch.linspace(0.1, 9.0, 150) if weighed else None
    own, found = (
        errors(x, name, {}, importance),
        errors(x, name, searched(x, formats.parse(name), importance), importance),
    )
    assert bool((found <= own).all())
    if not weighed:
        assert float(found.sum()) <= GAINS.get(name, 1.0) * float(own.sum())


def test_columns_that_matter_more_are_kept_better() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(64)
    importance[::16] = 100.0
    for name in ("nvfp4", "nf4:64", "fp8_e4m3:row"):
        form = formats.parse(name)
        plain, weighed = (errors(x, name, searched(x, form, by), importance).sum() for by in (None, importance))
        assert float(weighed) < 0.97 * float(plain), name


def test_an_e4m3_scale_is_within_two_percent_of_the_best_of_all() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    own = encode(x, "nvfp4").tensors
    every = [
        errors(x, "nvfp4", {"scale": torch.full_like(own["scale"], code), "global_scale": own["global_scale"]})
        for code in range(1, 127)
    ]
    best = torch.stack(every).amin(0).sum()
    assert float(errors(x, "nvfp4", searched(x, formats.parse("nvfp4"))).sum()) < 1.02 * float(best)


def test_formats_without_scales_have_none_and_delayed_ones_are_refused() -> None:
    x = torch.randn(4, 32)
    assert searched(x, formats.parse("fp8_e4m3")) == {}
    with pytest.raises(ValueError, match="delayed"):
        searched(x, formats.parse("fp8_e4m3:tensor:delayed"))
