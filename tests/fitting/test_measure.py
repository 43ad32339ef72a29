"""Measurements are kept and taken again; the remainder and the kernels add up to what was measured of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.fitting import small

from parco import machine, weights
from parco.fitting import measure, table
from parco.fitting.candidates import Judged
from parco.fitting.stages import Silent
from parco.nn import groups

SHAPE = (48, 64)
SPECS = [weights.parse("quantized(int4:32, 48x64)"), weights.parse("lowrank(dense(bf16, 48x16), dense(bf16, 16x64))")]


def test_every_kind_is_timed_once_and_then_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = measure.Timings("1", tmp_path)
    measure.measure_kernels({SHAPE: SPECS}, (1, 16), torch.bfloat16, 1 << 20, timings, Silent())
    kinds = [measure.native(SHAPE), *map(str, SPECS)]
    keys = [measure.kernel_key(kind, rows, torch.bfloat16, 1 << 20) for kind in kinds for rows in (1, 16)]
    assert all(timings[key] > 0 for key in keys)

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "_time_shape", refuse)
    again = measure.Timings("1", tmp_path)
    measure.measure_kernels({SHAPE: SPECS}, (1, 16), torch.bfloat16, 1 << 20, again, Silent())
    assert [again[key] for key in keys] == [timings[key] for key in keys]


def test_measurements_of_another_version_build_or_machine_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.Timings("1", tmp_path).add({"a": 1.0})
    assert "a" in measure.Timings("1", tmp_path)
    assert "a" not in measure.Timings("2", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "extension", lambda: "another build")
        assert "a" not in measure.Timings("1", tmp_path)
    monkeypatch.setattr(machine, "isa", lambda: "generic")
    assert ("a" in measure.Timings("1", tmp_path)) == (machine.detect().isas == ("generic",))


def test_two_processes_keep_each_others_measurements(tmp_path: Path) -> None:
    first, second = measure.Timings("1", tmp_path), measure.Timings("1", tmp_path)
    first.add({"a": 1.0})
    second.add({"b": 2.0})
    assert measure.Timings("1", tmp_path)["a"] == 1.0
    assert measure.Timings("1", tmp_path)["b"] == 2.0


@pytest.mark.parametrize(
    "text",
    ["int4:32", "int8:row", "int4:32:asym", "nf4:64", "mxfp4", "nvfp4", "fp8_e4m3:row", "int4:32+factor(rank=16)"],
)
def test_plausible_tensors_fit_the_spec_and_are_finite(text: str) -> None:
    from parco.fitting.methods import Method

    spec = Method.parse(text).spec(SHAPE)
    tensors = measure.plausible_tensors(spec)
    assert [(tuple(t.shape), t.dtype) for t in tensors] == [(s.shape, s.dtype) for s in spec.tensors().values()]
    assert bool(spec.apply(torch.randn(2, SHAPE[1]), *tensors).isfinite().all())


def test_the_table_adds_up_to_the_measured_original(tmp_path: Path) -> None:
    model = small.model()
    judged = {
        group.name: [Judged("keep", 100, 0.0, 0.0)]
        + ([] if group.kind == "embed" else [Judged("int4:32", 30, 0.01, 0.01)])
        for group in groups(model)
    }
    timings = measure.Timings("1", tmp_path)
    table.measure(model, judged, 16, 1 << 20, torch.bfloat16, timings, Silent())
    options, fixed = table.build(model, judged, (1.0, 2.0), 5000, 16, 1 << 20, torch.bfloat16, timings)
    kept = [rows[0] for rows in options.values()]
    assert fixed.decode + sum(option.decode for option in kept) == pytest.approx(1.0)
    assert fixed.prefill + sum(option.prefill for option in kept) == pytest.approx(2.0)
    assert fixed.bytes + sum(option.bytes for option in kept) == 5000
    assert options["embed"][0].decode == 0.0, "a lookup is no product"
    assert options["head"][0].prefill == options["head"][0].decode, "prefill needs the head for one position alone"
    qkv = options["model.layers.0.self_attn.qkv"]
    single = {
        name: timings[measure.kernel_key(name, 1, torch.bfloat16, 1 << 20)]
        for name in ("native(48x48)", "native(16x48)")
    }
    assert qkv[0].decode == pytest.approx(single["native(48x48)"] + 2 * single["native(16x48)"])


def test_whole_models_are_timed_in_turn() -> None:
    found = measure.interleaved({"a": small.model(), "b": small.model()}, 16, 1)
    assert set(found) == {"a", "b"}
    assert all(seconds > 0 for pair in found.values() for seconds in pair)


def test_damaged_timings_are_measured_again(tmp_path: Path) -> None:
    first = measure.Timings("1", tmp_path)
    first.add({"a": 1.0})
    first.path.write_text('{"seconds": {"a"')
    again = measure.Timings("1", tmp_path)
    assert "a" not in again
    again.add({"a": 2.0})
    assert measure.Timings("1", tmp_path)["a"] == 2.0
