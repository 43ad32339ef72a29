"""One right factor for a group: the optimum of its stacked matrix, stored and timed once, fitted, healed and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import small
from transformers import AutoModelForCausalLM

import parco
from parco.fitting import evaluate, measure, table
from parco.fitting.candidates import considered
from parco.fitting.factor import factorize
from parco.fitting.methods import Factor, parse
from parco.fitting.size import group_bytes
from parco.fitting.statistics import Statistics
from parco.nn import groups
from parco.weights import LowRank, Shared, Weight

ROWS, COLUMNS = (40, 24, 24), 48


def members(cross: bool = False, fisher: bool = False) -> tuple[list[torch.Tensor], list[Statistics]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, COLUMNS, generator=generator) for rows in ROWS]
    inputs = torch.randn(500, COLUMNS, generator=generator) * torch.logspace(0, -1, COLUMNS)
    original = inputs + 0.1 * torch.randn(500, COLUMNS, generator=generator) if cross else None
    seen = Statistics.of(inputs, original)
    gradients = torch.rand(len(ROWS), COLUMNS, generator=generator) if fisher else [None] * len(ROWS)
    return weights, [
        Statistics(seen.gram, seen.count, seen.cross, torch.ones(rows), seen.magnitude, squared)
        for rows, squared in zip(ROWS, gradients, strict=True)
    ]


@pytest.mark.parametrize("cross", [False, True])
def test_it_is_the_optimum_of_the_stacked_matrix(cross: bool) -> None:
    weights, seen = members(cross)
    made = list(parse("joint(rank=16,format=fp32)").each(zip(weights, seen, strict=True)))
    left, right = factorize(torch.cat(weights), 16, seen[0])
    for (spec, tensors), rows in zip(made, left.split(ROWS), strict=True):
        assert isinstance(spec, LowRank)
        assert isinstance(spec.right, Shared)
        torch.testing.assert_close(spec.dense(*tensors), rows @ right, atol=1e-4, rtol=1e-4)
    assert len({tensors[-1].data_ptr() for _, tensors in made}) == 1


def test_fisher_information_adds_up_over_the_members() -> None:
    weights, seen = members(fisher=True)
    made = list(parse("joint(rank=16,metric=fisher,format=fp32)").each(zip(weights, seen, strict=True)))
    total = sum(each.fisher for each in seen if each.fisher is not None)
    whole = Statistics(seen[0].gram, seen[0].count, fisher=total)
    spec, tensors = Factor(rank=16, metric="fisher", format="fp32")(torch.cat(weights), whole)
    found = torch.cat([each.dense(*own) for each, own in made])
    torch.testing.assert_close(found, spec.dense(*tensors), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["joint(0.5)", "joint(rank=16)>>int8:row", "joint(0.5)>>nf4:16"])
def test_what_is_made_is_what_was_announced(text: str) -> None:
    weights, seen = members()
    method = parse(text)
    shapes = [(rows, COLUMNS) for rows in ROWS]
    specs = method.specs(shapes)
    for _ in range(2):  # the second time what was stacked is known
        made = list(method.each(zip(weights, seen, strict=True)))
        assert [spec for spec, _ in made] == specs
        assert method.products(shapes)[0] == specs[0].parts()["right"].parts()["basis"]
    assert [spec for spec, _ in method.each([(weights[0], seen[0])])] == [method.alone().spec(shapes[0])]
    weights[0] *= 2
    again = list(method.each(zip(weights, seen, strict=True)))
    assert not torch.equal(again[0][0].dense(*again[0][1]), made[0][0].dense(*made[0][1])), "changed numbers are seen"


def test_it_keeps_more_than_factors_apart_where_directions_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(24, COLUMNS, generator=generator)
    weights = [torch.randn(rows, 24, generator=generator) @ common for rows in ROWS]
    weights = [each + 0.3 * torch.randn(each.shape, generator=generator) for each in weights]

    def error(text: str) -> float:
        made = parse(text).each((each, None) for each in weights)
        return sum(float((w - s.dense(*t)).square().sum()) for w, (s, t) in zip(weights, made, strict=True))

    apart = sum(spec.nbytes for spec in parse("factor(rank=16)").specs([(rows, COLUMNS) for rows in ROWS]))
    right, *lefts = parse("joint(rank=24)").products([(rows, COLUMNS) for rows in ROWS])
    assert right.nbytes + sum(left.nbytes for left in lefts) <= apart
    assert error("joint(rank=24)") < 0.5 * error("factor(rank=16)")


def test_only_what_reads_one_input_shares() -> None:
    with pytest.raises(ValueError, match="several widths"):
        parse("joint(0.5)").specs([(8, 32), (8, 48)])
    model = small.model()
    for group in groups(model):
        found = considered(model, group, ["joint(0.5)", "factor(0.5)"])[1:]
        if group.reads_one_input:
            assert found[0] == "joint(0.5)"
        else:
            assert "joint(0.5)" not in found, "of one matrix it is factor(0.5), and not tried twice"


def test_bytes_and_seconds_count_the_factor_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_time_shape", lambda shape, kinds, *_: dict.fromkeys(kinds, float(sum(shape))))
    model = small.model()
    group = next(group for group in groups(model) if group.kind == "qkv")
    timings = measure.Timings("test", tmp_path)
    judged = {each.name: [] for each in groups(model)}
    judged[group.name] = [table.Judged("joint(rank=16)", 0, 0.0, 0.0), table.Judged("factor(rank=16)", 0, 0.0, 0.0)]
    progress = _Quiet()
    table.measure(model, judged, 8, 1 << 20, torch.bfloat16, timings, progress)

    def decode(method: str) -> float:
        return table.seconds(model, group, method, 8, 1 << 20, torch.bfloat16, timings)[0]

    assert decode("joint(rank=16)") == (16 + 48) + (48 + 16) + (16 + 16) + (16 + 16)
    assert decode("factor(rank=16)") == (48 + 48) + (16 + 48) + (16 + 48)
    saved = group_bytes(model, group, "factor(rank=16)") - group_bytes(model, group, "joint(rank=16)")
    assert saved > 2 * 16 * 48 * 2, "two of three right factors, and their lines in the header"


class _Quiet:
    def stage(self, *_: object) -> None: ...
    def advance(self, *_: object) -> None: ...


def test_a_fit_chooses_heals_saves_and_loads_it(
    small_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_shape(shape: tuple[int, int], kinds: Mapping[str, Weight | None], *_: Any) -> dict[str, float]:
        return {key: 1e-9 * (2 * shape[0] * shape[1] if spec is None else spec.nbytes) for key, spec in kinds.items()}

    monkeypatch.setattr(evaluate, "peak_memory", lambda _: 1 << 20)
    monkeypatch.setattr(measure, "_time_shape", time_shape)
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "fitted"
    methods = ("joint(0.5)", "joint(0.5)>>int8:row")
    parco.fit(small_folder, data=small_text, size=0.75, out=out, methods=methods, heal=4, seed=1)
    result = json.loads((out / "result.json").read_text())
    rows = {row["group"]: row for row in result["groups"]}
    joint = [row for row in rows.values() if row["method"].startswith("joint")]
    assert joint, "the budget needs it"
    assert all(len(row["members"]) > 1 for row in joint)
    assert result["fitted"]["fraction"] <= 0.75
    assert result["heal"]["kl_after"] <= result["heal"]["kl_before"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    parts = [model.get_submodule(member).weight.right for member in joint[0]["members"]]
    assert all(part is parts[0] for part in parts)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(3, 30)[None]).logits).all())
    assert "joint" in (out / "report.html").read_text()
