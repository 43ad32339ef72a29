"""Training runs whole: texts, Transformers' Trainer with what it lacks, and several recipes side by side."""

from parco.trainer.compare import Comparison, Failure, compare
from parco.trainer.gaps import Gap, gaps
from parco.trainer.result import RunResult, SoFar, so_far
from parco.trainer.run import Settings, run
from parco.trainer.trainer import Trainer

__all__ = [
    "Comparison",
    "Failure",
    "Gap",
    "RunResult",
    "Settings",
    "SoFar",
    "Trainer",
    "compare",
    "gaps",
    "run",
    "so_far",
]
