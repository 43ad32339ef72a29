"""What ways to multiply cost, timed as a user runs them and interleaved in one run: products, and whole models."""

from parco.bench.llama_cpp import LlamaCpp
from parco.bench.peers import BASELINE, PEERS, Contender, installed
from parco.bench.products import FORMATS, ROUNDS, ROWS, Missing, Report, Row, Shape, contenders, run
from parco.bench.speeds import ModelRow, ModelsReport, Transformed, speeds

__all__ = [
    "BASELINE",
    "FORMATS",
    "PEERS",
    "ROUNDS",
    "ROWS",
    "Contender",
    "LlamaCpp",
    "Missing",
    "ModelRow",
    "ModelsReport",
    "Report",
    "Row",
    "Shape",
    "Transformed",
    "contenders",
    "installed",
    "run",
    "speeds",
]
