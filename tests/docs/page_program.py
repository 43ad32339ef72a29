"""Head of the program that test_code_blocks.py writes for each page: runs its blocks one after the other."""

import doctest
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
NAMES = {"__name__": "__main__"}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "COLUMNS": "120",
    "NO_COLOR": "1",
}


def run_python(body: str, place: str) -> None:
    print(f"== {place}", flush=True)
    exec(compile(body, place, "exec"), NAMES)


def run_console(body: str, place: str) -> None:
    commands = [part for part in ("\n" + body).split("\n$ ") if part.strip()]
    for text in commands:
        command, _, expected = text.partition("\n")
        print(f"== {place}: {command}", flush=True)
        words = shlex.split(command)
        if words[0] == "make":  # the target must exist; .ci/run makes it
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            continue
        ran = subprocess.run(command, shell=True, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
        print(ran.stdout, flush=True)
        if ran.returncode != 0:
            sys.exit(f"{place}: `{command}` ended with {ran.returncode}")
        right = doctest.OutputChecker().check_output(expected, ran.stdout, doctest.ELLIPSIS)
        if expected.strip() and not right:
            sys.exit(f"{place}: `{command}` printed something else than the page shows:\n{expected}")
