"""parco.bench: that every contender multiplies what it says, and that what cannot run is named."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parco import bench, cli, machine
from parco.bench.record import quartiles
from parco.report import throughput

SHAPE = (64, 96)


@pytest.fixture(scope="module", autouse=True)
def peaks_from_the_cache() -> Iterator[None]:
    """The probes take seconds each time; that they are asked anew is no concern of these tests."""
    kept = machine.peaks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "peaks", lambda refresh=False: kept)
        yield


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run(
        {SHAPE: 3}, formats=["int4:32", "bf16", "mxfp8_e4m3"], rows=[1, 20], rounds=2, between=1 << 16, peers=[]
    )


def test_every_contender_is_timed_on_every_number_of_rows(report: bench.Report) -> None:
    names = {"torch fp32", "torch bf16", "torch int8pack", "torch int4pack:32", "torch int_mm"}
    names |= {"parco int4:32", "parco int4:32 activations(int8)", "parco bf16", "parco mxfp8_e4m3"}
    assert {row["contender"] for row in report["rows"]} | {one["contender"] for one in report["missing"]} == names
    for row in report["rows"]:
        assert row["quartile1_us"] <= row["median_us"] <= row["quartile3_us"]
        assert row["G_multiply_adds_per_s"] == pytest.approx(row["rows"] * 64 * 96 / row["median_us"] / 1e3)
        assert row["GB_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
        assert row["of_peak"] > 0
        assert (row["times_bf16"] == 1) == (row["contender"] == bench.BASELINE)
    (int4,) = (row for row in report["rows"] if row["contender"] == "parco int4:32" and row["rows"] == 1)
    assert (int4["bytes"], int4["layers"]) == (64 * 96 // 2 + 64 * 3 * 2, 3)
    assert int4["kernel"].startswith("int-linear-")


@pytest.mark.parametrize("rows", [1, 20])
def test_contenders_multiply(rows: int) -> None:
    """Those that store the matrix itself come near the product; torch's int4 and int8 ones are fed random codes."""
    weight, x = torch.randn(SHAPE), torch.randn(rows, 96).bfloat16()
    wanted = x.double() @ weight.double().T
    for contender in bench.contenders(SHAPE, rows, ["int8:row", "fp8_e4m3:row"]):
        y = contender.run(x, *contender.make(weight))
        assert y.shape == (rows, 64), contender.name
        if contender.name not in ("torch int4pack:32", "torch int_mm"):
            assert (y.double() - wanted).norm() < 0.05 * wanted.norm(), contender.name


def test_a_peer_that_cannot_run_is_named_and_costs_nothing_else() -> None:
    found = bench.run({(30, 50): 1}, formats=["int4:32"], rows=[1, 2], rounds=1, between=1, peers=[])
    refused = [one for one in found["missing"] if one["contender"] == "torch int4pack:32"]
    assert [(one["shape"], bool(one["reason"])) for one in refused] == [((30, 50), True)]
    bars = throughput.figure(found).data[0].y
    assert "torch int4pack:32" not in bars
    assert "parco int4:32" in bars
    assert {row["contender"] for row in found["rows"]} >= {"torch bf16", "parco int4:32"}


def test_the_axes_of_the_plot_end_at_the_peak(report: bench.Report) -> None:
    drawn = throughput.figure(report)
    assert drawn.layout.xaxis.range == (0, report["peaks"]["read_bytes_per_second"] / 1e9)
    elements = {row["element"] for row in report["rows"]}
    assert drawn.layout.xaxis2.range == (0, max(report["peaks"][element] for element in elements) / 1e9)
    bars = dict(zip(drawn.data[0].y, drawn.data[0].x, strict=True))
    (int4,) = (row for row in report["rows"] if row["contender"] == "parco int4:32" and row["rows"] == 1)
    assert bars["parco int4:32"] == pytest.approx(int4["GB_per_s"])
    assert not drawn.layout.shapes


def test_a_bar_beyond_the_peak_is_seen_whole(report: bench.Report) -> None:
    most = max(row["GB_per_s"] for row in report["rows"] if row["rows"] == 1)
    slower = {**report["peaks"], "read_bytes_per_second": most * 1e9 / 2}
    drawn = throughput.figure({**report, "peaks": slower})
    assert drawn.layout.xaxis.range == pytest.approx((0, most))
    assert [(line.x0, line.xref) for line in drawn.layout.shapes] == [(pytest.approx(most / 2), "x")]
    assert "the line is this machine's measured peak" in drawn.layout.xaxis.title.text
    assert "the axis ends at this machine's measured peak" in drawn.layout.xaxis2.title.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [0]}, r"rows=\[0\]"),
        ({"rounds": 0}, r"rounds=\[0\]"),
        ({"formats": ["int99"]}, "int99"),
        ({"formats": ["fp8_e4m3:tensor:delayed"]}, "earlier step"),
        ({"rows": []}, r"rows=\[\]"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.run({SHAPE: 1}, peers=[], **arguments)


def test_the_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    words = [
        "bench",
        "--shapes",
        "64x96,64x96,32x64",
        "--formats",
        "int4:32",
        "--rows",
        "1,2",
        "--rounds",
        "1",
        "--peers",
        "torch",
    ]
    assert cli.main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "64 outputs x 96 inputs, 2 layers: time, times PyTorch's bf16 in the same rounds" in printed
    assert "parco int4:32" in printed
    saved = json.loads((out / "bench.json").read_text())
    assert {tuple(row["shape"]): row["layers"] for row in saved["rows"]} == {(64, 96): 2, (32, 64): 1}
    assert "<script" in (out / "bench.html").read_text()
    assert cli.main([*words, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "64"], "'64' is no shape"),
        (["--shapes", "64x96", "--rows", "1,no"], "'no' is no whole number"),
        (
            ["--shapes", "64x96", "--formats", "int4:32,int9:32"],
            "--formats: unknown format 'int9:32'",
        ),
        (["--shapes", "64x96", "--peers", "numpy"], "--peers numpy is no peer; here are torch"),
        (["nowhere-at-all"], "nowhere-at-all"),
        (["a-model", "--shapes", "64x96"], "give one of them"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_without_a_model_the_embedded_one_is_taken(tmp_path: Path) -> None:
    words = [
        "bench",
        "--rows",
        "1",
        "--rounds",
        "1",
        "--formats",
        "int4:32",
        "--peers",
        "torch",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(words) == 0
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert sum({tuple(row["shape"]): row["layers"] for row in saved["rows"]}.values()) == 36


def test_quartiles_lie_between_the_extremes() -> None:
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 9.0]) == (3.0, 5.0, 7.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 100.0]) == (2.0, 3.0, 4.0)
