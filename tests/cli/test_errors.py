"""What a person did wrong is one line on stderr and exit code 2: nothing on stdout, no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub import tiny

from parco import hub, machine
from parco.cli import main

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that these arguments are refused with."""
    capfd.readouterr()
    status = main(arguments)
    said = capfd.readouterr()
    assert (status, said.out) == (2, ""), said
    lines = [line for line in said.err.splitlines() if line.startswith("parco: ")]
    assert len(lines) == 1
    assert said.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in said.err
    return lines[0]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def infinite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 1] = -torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "no folder"),
        (no_config, "is not a model: it has no config.json"),
        (no_tokenizer, "has no tokenizer"),
        (not_a_number, "'model.layers.1.mlp.up_proj.weight'"),
        (infinite, "'model.layers.0.self_attn.q_proj.weight'"),
        (truncated, "is truncated"),
    ],
    ids=["missing folder", "not a model", "no tokenizer", "NaN", "inf", "truncated"],
)
@pytest.mark.parametrize(
    "command", [("fit",), ("eval",), ("generate", "def"), ("explain",)], ids=lambda command: command[0]
)
def test_a_model_that_cannot_be_read(
    copy: Path, capfd: pytest.CaptureFixture[str], command: tuple[str, ...], spoil: Edit, said: str
):
    spoil(copy)
    name, *rest = command
    line = refused(capfd, name, str(copy), *rest)
    assert said in line
    assert str(copy) in line


def test_a_model_without_linear_layers(copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Transformers has no causal model without one, so a model is made to look so."""
    monkeypatch.setattr(sys.modules["parco.hub.load"], "linears", lambda model: {})
    assert "without linear layers" in refused(capfd, "fit", str(copy))


def test_a_text_shorter_than_one_window(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    text = tmp_path / "short.txt"
    text.write_text("def fit():\n")
    for command in ("fit", "eval"):
        line = refused(capfd, command, str(copy), "--data", str(text))
        assert "shorter than one window" in line
        assert "one window is 64" in line


def test_a_text_that_is_not_there(copy: Path, capfd: pytest.CaptureFixture[str]):
    for command in ("fit", "eval"):
        assert "absent.txt" in refused(capfd, command, str(copy), "--data", "absent.txt")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fit model --data empty.txt", "--data empty.txt is empty"),
        ("fit model --data blank.txt", "--data blank.txt is empty"),
        ("eval model --data empty.txt", "--data empty.txt is empty"),
        ("eval model --against absent", "no folder 'absent'"),
        ("tune model --data empty.txt --out out", "--data empty.txt is empty"),
        ("train --model model --data empty.txt --steps 1 --out out", "--data empty.txt is empty"),
        ("train --model model --data full.txt --heldout absent.txt --steps 1 --out out", "absent.txt"),
    ],
)
def test_what_is_read_is_looked_for_before_a_model_is_loaded(
    copy: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    said: str,
):
    for name, content in (("empty", ""), ("blank", " \n" * 99), ("full", "import torch\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert said in refused(capfd, *command.split())


def test_an_unknown_method_names_the_known_ones(copy: Path, capfd: pytest.CaptureFixture[str]):
    line = refused(capfd, "fit", str(copy), "--methods", "int4:32,zip")
    assert "'zip'" in line
    assert "factor(" in line
    assert "int" in line.partition("'zip'")[2]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--size", "0.3", "--speed", "2"), ("size", "speed")),
        (("--size", "0"), ("size", "0")),
        (("--size", "1.5"), ("size", "1.5")),
        (("--size", "nan"), ("size", "nan")),
        (("--speed", "-1"), ("speed", "-1")),
        (("--loss", "-0.5"), ("loss", "-0.5")),
        (("--heal", "-3"), ("heal", "-3")),
        (("--size", "60%"), ("--size 60% makes no sense: it must be a number.", "as a fraction of", "0.35")),
        (("--heal", "2.5"), ("--heal 2.5 makes no sense: it must be a whole number.", "Training steps")),
        (("--sise", "0.3"), ("--sise", "--size")),
        (("one", "two"), ("two",)),
    ],
)
def test_options_that_make_no_sense(
    copy: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], parts: tuple[str, ...]
):
    line = refused(capfd, "fit", str(copy), *options)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(("option", "value"), [("--tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")])
def test_generate_refuses_values_that_make_no_sense(
    copy: Path, capfd: pytest.CaptureFixture[str], option: str, value: str
):
    line = refused(capfd, "generate", str(copy), "def", option, value)
    assert option in line
    assert value in line


def test_an_unreachable_size_names_the_best_reachable(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(tiny.SENTENCES * 12))
    line = refused(
        capfd, "fit", str(copy), "--data", str(text), "--size", "0.001", "--methods", "int8:row", "--out", str(out)
    )
    assert "--size 0.001 cannot be reached" in line
    assert "the smallest plan takes 0.6" in line
    assert not out.exists()


def test_an_unknown_layer_names_known_ones(copy: Path, capfd: pytest.CaptureFixture[str]):
    line = refused(capfd, "explain", str(copy), "--layer", "no.such.layer")
    assert "no.such.layer" in line
    assert "model.layers.0.mlp.up_proj" in line


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parco.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )


def test_an_instruction_set_that_is_not_there():
    missing = sorted(set(machine.ISAS) - set(machine.detect().isas)) or ["sse9"]
    done = process("machine", PARCO_ISA=missing[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert repr(missing[0]) in done.stderr
    assert "usable here: generic" in done.stderr


def test_the_exit_code_reaches_the_shell():
    done = process("fit", "/nowhere/at/all")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("parco: no folder '/nowhere/at/all'")


def test_debug_shows_where_it_happened():
    with pytest.raises(FileNotFoundError):
        main(["fit", "/nowhere/at/all", "--debug"])


def test_a_fitted_model_is_not_fitted_again(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    hub.save(tiny.store(tiny.model("llama")), tiny.tokenizer(), tmp_path / "small")
    line = refused(capfd, "fit", str(tmp_path / "small"), "--size", "0.5", "--out", str(tmp_path / "smaller"))
    assert "stored in few bits already" in line
    assert not list(tmp_path.glob("smaller*"))
