"""Training runs whole: texts, Transformers' Trainer with what it lacks, several recipes side by side, and adapters."""

from parco.trainer.compare import Comparison, Failure, compare
from parco.trainer.gaps import Gap, gaps
from parco.trainer.merge import Merged, merge
from parco.trainer.result import RunResult, SoFar, so_far
from parco.trainer.run import Settings, run
from parco.trainer.trainer import Trainer
from parco.trainer.tune import TuneResult, TuneSettings, method_of, tune

__all__ = [
    "Comparison",
    "Failure",
    "Gap",
    "Merged",
    "RunResult",
    "Settings",
    "SoFar",
    "Trainer",
    "TuneResult",
    "TuneSettings",
    "compare",
    "gaps",
    "merge",
    "method_of",
    "run",
    "so_far",
    "tune",
]
