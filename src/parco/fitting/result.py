"""What a fit leaves behind: the schema of `result.json`, from which the page and the tables are made.

Plain TypedDicts, because the file is read by people and by programs that do not import parco. Units are in the names or
here: bytes are those of the safetensors, headers counted; losses are nats per token, times seconds, rates tokens per
second. A value that was not measured is None, never a guess.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

SCHEMA = 1


class Column(TypedDict):
    """One model measured end to end on the held-out windows and on this machine."""

    name: str  # "original", "fitted"
    bytes: int  # of the safetensors: parameters, scales, norms, biases, headers; tied tensors once
    fraction: float  # bytes / bytes of the bf16 checkpoint
    loss: float  # mean cross entropy, nats per token, whole held-out text
    perplexity: float  # exp(loss)
    kl: float  # mean KL(original || this), nats per token; 0 for the original
    top1: float  # share of positions whose most likely token is the original's; 1 for the original
    decode: float  # tokens per second, batch 1, after a short prompt
    prefill: float  # tokens per second of one prompt of `prefill_tokens`
    memory: int | None  # peak resident bytes of a fresh process that loads this model and decodes


class FrontierPoint(TypedDict):
    """One plan of the sweep: what the solver predicts, and what was measured where it was applied."""

    name: str  # such as "size 0.35"
    plan: str  # hash of the choices
    summary: str  # "int5:64 x 12, int4:64 x 8, keep x 1"
    bytes: int
    fraction: float
    predicted_loss: float  # calibrated by the measured plans, before healing
    measured_loss: float | None  # KL on the check windows, before healing
    healed_loss: float | None  # KL on the check windows, after healing
    decode_seconds: float  # predicted, per token
    prefill_seconds: float  # predicted, per prompt of `prefill_tokens`
    measured_decode_seconds: float | None
    measured_prefill_seconds: float | None
    chosen: bool


class Passed(TypedDict):
    """A candidate that was not taken, and why."""

    method: str
    bytes: int
    predicted_loss: float
    decode_seconds: float | None
    prefill_seconds: float | None
    reason: str


class GroupRow(TypedDict):
    """One group of layers: its choice, what it was predicted to cost and what it cost. Lookups are not timed."""

    group: str
    kind: str  # "attention", "mlp", "embedding", "head", ...
    members: list[str]
    shapes: list[list[int]]  # [N, K] of each member
    method: str
    kernel: str  # the kernel that runs at batch 1
    bytes: int
    original_bytes: int
    predicted_loss: float
    measured_error: float | None  # relative squared error of the outputs on the shifted inputs, mean over the members
    decode_seconds: float | None  # measured, all members, one token
    prefill_seconds: float | None  # measured, all members, one prompt
    original_decode_seconds: float | None
    original_prefill_seconds: float | None
    passed: list[Passed]


class Alternative(TypedDict):
    """A uniform choice of at most the chosen plan's bytes, equally healed, on the same held-out windows."""

    name: str  # the method's text, or "chosen plan" for the row to compare with
    bytes: int
    fraction: float
    loss: float  # nats per token on the first `compared_windows` of the held-out ones
    error: float | None  # standard error of its difference to the chosen plan's loss; None of a single window
    kl: float
    top1: float
    healed_steps: int
    chosen: bool


class Sample(TypedDict):
    prompt: str
    original: str
    fitted: str


class Remainder(TypedDict):
    """What no choice of products changes: attention, norms, cache, and the framework's own overhead."""

    decode_seconds: float  # per token: measured step minus the measured kernels of its matrices
    prefill_seconds: float
    decode_share: float  # of the original's step
    prefill_share: float
    explanation: str  # a sentence


class StageTime(TypedDict):
    stage: str
    seconds: float  # wall time spent in it, over all runs that contributed
    resumed: bool  # found whole on disk by the last run


class HealRecord(TypedDict):
    steps: int
    tokens_per_step: int
    kl_before: float  # check windows
    kl_after: float
    curve: list[list[float]]  # [step, KL on the check windows]


class Target(TypedDict):
    kind: Literal["size", "speed", "loss"]
    value: float
    reached: float  # the same quantity, measured
    met: bool


class Result(TypedDict):
    schema: int
    parco: str  # version
    model: str  # what was named: folder, hub name or "embedded"
    architecture: str
    fingerprint: str  # of the model's files
    parameters: int
    checkpoint_bytes: int  # bf16 bytes of the original
    folder: str | None  # where the fitted model was saved
    command: str
    seed: int
    threads: int
    target: Target
    plan: dict[str, Any]  # Plan.to_json()
    data: dict[str, Any]  # source, sha256, window, calibration/check/held-out/compared windows, generated windows
    prefill_tokens: int
    original: Column
    fitted: Column
    frontier: list[FrontierPoint]
    groups: list[GroupRow]
    alternatives: list[Alternative]
    remainder: Remainder
    heal: HealRecord | None
    sample: Sample
    machine: dict[str, Any]  # Machine as a dict
    versions: dict[str, str]
    stages: list[StageTime]
    warnings: list[str]
