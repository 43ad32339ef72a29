"""parco.whole: every entrant is timed at what it does, beside the one that holds the same numbers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.hub import tiny

from parco import bench, cli, hub, machine, whole
from parco.fitting.convert import convert_
from parco.report import speeds

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 2,
    "attention_bias": False,
}


@pytest.fixture(autouse=True)
def peaks_from_the_cache() -> Iterator[None]:
    """The probes take seconds each time; that they are asked anew is no concern of these tests."""
    kept = machine.peaks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "peaks", lambda refresh=False: kept)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "model", mlp_bias=False, **SIZES)


def has_llama_cpp() -> bool:
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def test_every_entrant_is_timed_at_all_that_it_does(folder: Path) -> None:
    report = whole.run(folder, formats=["int4:32", "nvfp4"], prompt=8, steps=2, rounds=2)
    rows = {(row["contender"], row["kind"]): row for row in report["rows"]}
    theirs = ["llama.cpp Q4_0 of int4:32"] if has_llama_cpp() else []
    ours = ["Transformers", "parco int4:32", "parco nvfp4"]
    assert set(rows) == {
        *((name, kind) for name in ours for kind in ("prefill", "decode", "generate")),
        *((name, kind) for name in theirs for kind in ("prefill", "decode")),
    }
    assert [one["contender"] for one in report["missing"]] == (["llama.cpp nvfp4"] if theirs else [])
    for row in rows.values():
        assert 0 < row["quartile1"] <= row["tokens_per_second"] <= row["quartile3"]
        assert row["GB_per_s"] > 0 and 0 < row["of_peak"] < 100
        assert math.isclose(row["times_first"], 1) == (row["contender"] == "Transformers")
        assert (row["times_rival"] is not None) == (bool(theirs) and row["contender"] == "parco int4:32")
    # Of each layer q, k, v, o and three of the feed-forward block; the head, not the embedding; norms. Whole panels.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    products = 2 * layer + 64 * 320
    norms = 5 * 64 * 2
    assert rows["Transformers", "decode"]["read_bytes"] == 2 * products + norms
    assert rows["parco int4:32", "decode"]["read_bytes"] == products // 2 + products // 32 * 2 + norms
    step = rows["parco int4:32", "decode"]
    assert step["G_multiply_adds_per_s"] == pytest.approx(products * step["tokens_per_second"] / 1e9)
    if theirs:
        q4 = rows[theirs[0], "decode"]["read_bytes"]
        assert q4 == products // 2 + products // 32 * 2 + 2 * norms


def test_a_model_saved_by_parco_is_timed_as_it_is(folder: Path, tmp_path: Path) -> None:
    loaded = hub.load(folder)
    convert_(loaded.model, "int8:32")
    fitted = hub.save(loaded.model, loaded.tokenizer, tmp_path / "fitted")
    report = whole.run(fitted, prompt=4, steps=1, rounds=1, llama_cpp=has_llama_cpp())
    names = {row["contender"] for row in report["rows"]}
    assert names == {"parco as saved", *(["llama.cpp Q8_0 of as saved"] if has_llama_cpp() else [])}
    with pytest.raises(ValueError, match="stored by parco already"):
        whole.run(fitted, formats=["int4:32"])


def test_steps_are_those_of_a_growing_text(folder: Path) -> None:
    """As many calls of the model as were asked for, each of them with one token more behind it."""
    runner = bench.Transformed(hub.load(folder).model)
    lengths: list[tuple[int, int]] = []
    inner = runner.model.forward

    def forward(*args: object, **options: object) -> object:
        cache = options["past_key_values"] if options.get("past_key_values") is not None else None
        ids = options["input_ids"]
        assert isinstance(ids, torch.Tensor)
        lengths.append((ids.shape[1], 0 if cache is None else cache.get_seq_length()))  # pyright: ignore
        return inner(*args, **options)

    runner.model.forward = forward
    assert len(runner.decode([5, 6, 7], 2)) == 2
    assert lengths == [(3, 0), (1, 3), (1, 4)]
    lengths.clear()
    assert len(runner.generate([5, 6, 7], 2)) == 2
    assert lengths == [(3, 0), (1, 3), (1, 4)]


def test_the_axes_of_the_plot_end_at_the_peak(folder: Path) -> None:
    report = whole.run(folder, formats=["int8:32"], prompt=4, steps=1, rounds=1, llama_cpp=False)
    drawn = speeds.figure(report)
    peaks = dict(report["peaks"])
    assert drawn.layout.xaxis.range == (0, peaks.pop("read_bytes_per_second") / 1e9)
    assert drawn.layout.xaxis2.range == (0, max(peaks.values()) / 1e9)


def test_the_command_prints_and_saves(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    words = ["bench", str(folder), "--whole", "--formats", "int4:32", "--rounds", "1", "--out", str(out)]
    assert cli.main([*words, "--peers", "llama_cpp"] if has_llama_cpp() else words) == 0
    printed = capsys.readouterr().out
    assert "parco int4:32" in printed
    assert ("llama.cpp Q4_0" in printed) == has_llama_cpp()
    assert json.loads((out / "bench.json").read_text())["rows"]
    assert "<script" in (out / "bench.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "1"], "leave out --shapes and --rows"),
        (["--formats", "best"], "best"),
        (["--peers", "torchao"], "'torchao' runs no whole models"),
        (["--rounds", "0"], "rounds=0"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--whole", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
