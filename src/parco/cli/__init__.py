"""The command line: `parco fit`, `eval`, `generate`, `explain`, `train`, `tune`, `merge`, `report`, `bench`, `machine`.

One file per command; each reads its options, calls the library and prints. Nothing heavy is imported until a
command runs, so that `parco --help` answers at once.
"""

from parco.cli.program import main

__all__ = ["main"]
