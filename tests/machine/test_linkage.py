"""Code compiled for one instruction set must not be shared with the others."""

import shutil
import subprocess
from pathlib import Path

import pytest

from parco import machine

WEAK = set("VvWwu")


def test_no_function_compiled_for_an_instruction_set_can_replace_another(repository: Path) -> None:
    """Of a weak symbol (an inline function, a template) the linker keeps one copy for all translation units."""
    objects = repository / "build" / "dev" / "CMakeFiles" / "parco_kernels.dir" / "csrc"
    if shutil.which("nm") is None or not objects.is_dir():
        pytest.skip("needs nm and the objects of `make build`")
    files = [file for isa in machine.ISAS[1:] for file in objects.glob(f"*/*{isa}.cpp.o")]
    assert files
    listing = subprocess.run(["nm", "-C", "-A", *map(str, files)], capture_output=True, text=True, check=True).stdout
    shared = [line for line in listing.splitlines() if line.split(":", 1)[1][17:18] in WEAK]
    # typeinfo and personality routines hold no instructions.
    assert [line for line in shared if "DW.ref." not in line and "typeinfo" not in line] == []
