"""Fit a model to a budget: methods that store a matrix in fewer bytes, and the job that chooses one for every group of
layers.

calibrate -> candidates -> measure -> solve -> apply -> heal -> evaluate, one file each; pipeline.py is their order and
`parco.fit` (job.py) the way in.
"""

from parco.fitting.plan import Plan
from parco.fitting.result import Result
from parco.fitting.stages import Progress, Silent, Stages

__all__ = ["Plan", "Progress", "Result", "Silent", "Stages"]
