"""Training runs whole: texts, Transformers' Trainer with what it lacks, several recipes side by side, and adapters."""

from parco.trainer.compare import Comparison, Failure, compare
from parco.trainer.gaps import Gap, gaps
from parco.trainer.merge import Merged, merge
from parco.trainer.run import RunResult, Settings, run
from parco.trainer.trainer import Trainer
from parco.trainer.tune import TuneResult, TuneSettings, method_of, tune

__all__ = [
    "Comparison",
    "Failure",
    "Gap",
    "Merged",
    "RunResult",
    "Settings",
    "Trainer",
    "TuneResult",
    "TuneSettings",
    "compare",
    "gaps",
    "merge",
    "method_of",
    "run",
    "tune",
]
