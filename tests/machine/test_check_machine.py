"""What `make` asks of a fresh machine: each absence is one line with its remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for programs that stand in for what a machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def check(repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = repository / "scripts" / "check_machine.sh"
    return subprocess.run(
        ["sh", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def program(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_this_machine_has_what_it_needs(repository: Path) -> None:
    ran = check(repository, PYTHON=sys.executable)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_python(repository: Path) -> None:
    ran = check(repository, PYTHON="python-that-is-not-there")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "no python-that-is-not-there: install Python 3.11 or newer" in ran.stderr


def test_an_old_python(repository: Path, tools: Path) -> None:
    old = program(tools, "python", 'case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac')
    ran = check(repository, PYTHON=old)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "is 3.9.2: install Python 3.11 or newer" in ran.stderr


def test_no_venv_module_and_no_headers(repository: Path, tools: Path) -> None:
    bare = program(tools, "python", 'case "$2" in *version_info*) exit 0;; *) exit 1;; esac')
    ran = check(repository, PYTHON=bare)
    assert ran.returncode == 1
    assert [line.split(":")[0] for line in ran.stderr.splitlines()] == ["parco", "parco"]
    assert "lacks the venv module" in ran.stderr
    assert "lacks its headers" in ran.stderr


def test_no_compiler_is_said_beside_what_else_is_missing(repository: Path) -> None:
    ran = check(repository, PYTHON="python-that-is-not-there", CXX="compiler-that-is-not-there")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 2
    assert "no C++ compiler compiler-that-is-not-there: install GCC 11 or newer" in ran.stderr


def test_an_old_compiler(repository: Path, tools: Path) -> None:
    ran = check(repository, PYTHON=sys.executable, CXX=program(tools, "c++", "exit 1"))
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "cannot compile C++17 with OpenMP and AMX" in ran.stderr
