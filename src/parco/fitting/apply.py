"""Pass 2: carry a plan out, block by block, each block solved on what the already changed blocks before it produce.

Two streams of hidden states run through the model side by side: the original's, whose outputs are the target, and the
changed model's, whose inputs the solvers see. The check windows run along in the changed stream, so at the end the KL
to the original is known without another pass. Every block's new tensors are on disk before the next begins; `restore`
puts them into a fresh model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parco import weights
from parco.fitting import size
from parco.fitting.calibrate import Extent, block_groups, rows_of, statistics_of, vocabulary_of, with_energies
from parco.fitting.observe import Moments, See, expert_of, observed, site
from parco.fitting.size import owners
from parco.fitting.stages import Progress, Stage
from parco.fitting.statistics import Statistics, row_error
from parco.fitting.stream import Stream, windows_in_batches
from parco.fitting.texts import Windows
from parco.nn import StoredWeight, share_
from parco.nn.blocks import Group, matrix, replace_
from parco.weights import shared_tensors

FIRST, HEAD = "part-000-first", "part-999-head"
"""What the changed matrices before and after the blocks are kept as."""


@dataclass(frozen=True)
class Applied:
    """What a plan did to the model on the check windows: KL in nats per token, top-1 agreement, relative error per
    group.
    """

    kl: float
    top1: float
    errors: dict[str, float]


@torch.no_grad()
def apply_(
    model: nn.Module,
    methods: Mapping[str, str],
    windows: Windows,
    extent: Extent,
    calibrated: Stage,
    stage: Stage,
    progress: Progress,
) -> Applied:
    """Change `model` in place as `methods` (group name to method text) says; others are kept. Resumes inside."""
    pass_ = _Pass(Stream(model), methods, windows, extent, calibrated, stage)
    blocks = range(len(pass_.stream.names))
    known = [stage.has(name) for name in (FIRST, *map(_part, blocks), HEAD)]
    progress.stage("apply", len(known), sum(known))
    pass_.begin()
    progress.advance(1 - known[0])
    for index in blocks:
        pass_.block(index)
        progress.advance(1 - known[1 + index])
    kl, top1 = pass_.end()
    progress.advance(1 - known[-1])
    applied = Applied(kl, top1, pass_.errors)
    stage.write("applied", vars(applied))
    stage.finish()
    return applied


def _part(index: int) -> str:
    """What the changed matrices of a block are kept as."""
    return f"part-{index + 1:03}"


def read_applied(stage: Stage) -> Applied:
    return Applied(**stage.read("applied"))


def restore(model: nn.Module, stage: Stage) -> None:
    """Put the tensors of an applied stage into a fresh copy of the original model."""
    for path in sorted(stage.folder.glob("part-*.safetensors")):
        _put(model, stage, path.stem)


class _Pass:
    """The two streams and what the plan says."""

    def __init__(
        self,
        stream: Stream,
        methods: Mapping[str, str],
        windows: Windows,
        extent: Extent,
        calibrated: Stage,
        stage: Stage,
    ) -> None:
        self.stream = stream
        self.methods = methods
        self.calibrated = calibrated
        self.stage = stage
        self.errors: dict[str, float] = {}
        self.tokens = torch.cat([windows.calibration[: extent.statistics], windows.check[: extent.check]])
        self.counted = min(extent.statistics, windows.calibration.shape[0])
        self.rows = rows_of(windows.length)
        parameters = sum(parameter.numel() for parameter in stream.model.parameters())
        # Large models are solved without the original's states beside the shifted ones: it saves a third of the time.
        self.paired = parameters <= size.LARGE
        self.original = torch.empty(0)
        self.changed = torch.empty(0)

    def begin(self) -> None:
        """Enter both streams; the embedding changes in between. A tied head changes with it, on the original's
        statistics.
        """
        if self.paired:
            self.original = self._enter(self.tokens[: self.counted])
        first = [group for group in block_groups(self.stream.model, None) if group.kind != "head"]
        self._change(FIRST, first, lambda group: statistics_of(self.calibrated, group))
        self.changed = self._enter(self.tokens)

    def block(self, index: int) -> None:
        model = self.stream.model
        chosen = block_groups(model, index)
        active = [group for group in chosen if self.methods.get(group.name, "keep") != "keep"]
        name = _part(index)
        known = self.stage.has(name) or not active
        moments = Moments()
        with self.stream.block(index) as run:
            for part in windows_in_batches(self.changed[: self.counted], self.rows):
                before: dict[str, Tensor] = {}
                if self.paired:
                    with observed(
                        model, [] if known else active, lambda member, seen, _, b=before: b.__setitem__(member, seen)
                    ):
                        self.original[part] = run(self.original[part])
                if not known:
                    with observed(model, active, self._see(active, moments, before)):
                        run(self.changed[part])
        self._change(name, active, lambda group: self._statistics(group, moments))
        with self.stream.block(index) as run:
            for part in windows_in_batches(self.changed, self.rows):
                self.changed[part] = run(self.changed[part])

    def end(self) -> tuple[float, float]:
        """Change the head; return KL and top-1 agreement on the check windows."""
        model = self.stream.model
        heads = [group for group in block_groups(model, None) if group.kind == "head"]
        active = [group for group in heads if self.methods.get(group.name, "keep") != "keep"]
        if active and not self.stage.has(HEAD):
            moments = Moments()
            rows = rows_of(self.tokens.shape[1], vocabulary_of(model))
            with self.stream.outer(), observed(model, active, lambda member, seen, _: moments.add(member, seen)):
                for part in windows_in_batches(self.changed[: self.counted], rows):
                    self.stream.leave(self.changed[part])
            self._change(HEAD, active, lambda group: self._statistics(group, moments))
        else:
            self._change(HEAD, active, lambda group: {})
        return compare_streams(self.stream, self.changed[self.counted :], self.calibrated)

    def _enter(self, tokens: Tensor) -> Tensor:
        with self.stream.outer():
            return torch.cat([self.stream.enter(tokens[part]) for part in windows_in_batches(tokens, self.rows)])

    def _see(self, active: list[Group], moments: Moments, before: dict[str, Tensor]) -> See:
        sites = {site(group, member) for group in active for member in group.members}

        def see(member: str, seen: Tensor, _: Tensor) -> None:
            if member in sites:
                paired = before.get(member) if expert_of(member) is None else None
                moments.add(member, seen, paired)

        return see

    def _change(self, name: str, chosen: list[Group], statistics: Callable[[Group], Mapping[str, Statistics]]) -> None:
        """Solve the groups of one part, or read them from disk, and put them into the model."""
        active = [group for group in chosen if self.methods.get(group.name, "keep") != "keep"]
        if active and not self.stage.has(name):
            tensors: dict[str, Tensor] = {}
            specs: list[list[tuple[str, str]]] = []
            errors: dict[str, float] = {}
            for group in active:
                specs.append([])
                errors[group.name] = self._solve(group, statistics(group), tensors, specs[-1])
            self.stage.write_tensors(name, tensors, note={"specs": specs, "errors": errors})
        if active:
            self.errors |= _put(self.stream.model, self.stage, name)

    def _statistics(self, group: Group, moments: Moments) -> dict[str, Statistics]:
        """What the members see now, one Statistics object per site; of the gradients, what calibration saw."""
        shared: dict[str, Statistics] = {}
        for member in group.members:
            key = site(group, member)
            if key in moments.gram and key not in shared:
                cross = moments.cross.get(key)
                shared[key] = Statistics(
                    moments.gram[key].float(),
                    moments.count[key],
                    None if cross is None else cross.float(),
                    magnitude=moments.magnitude[key].float(),
                    peak=moments.peak[key],
                )
        found = {member: shared[site(group, member)] for member in group.members if site(group, member) in shared}
        return with_energies(self.calibrated, group, found)

    def _solve(
        self,
        group: Group,
        statistics: Mapping[str, Statistics],
        tensors: dict[str, Tensor],
        specs: list[tuple[str, str]],
    ) -> float:
        """Solve a group's members, whose tensors and specs are added in their order; returns the mean relative squared
        error of their outputs on the inputs that they will see.
        """
        method = size.method_for(group, self.methods[group.name])
        errors: list[float] = []
        given: list[tuple[str, Tensor, Statistics | None]] = []  # to the method and not judged yet

        def members() -> Iterator[tuple[Tensor, Statistics | None]]:
            for each in self._members(group, statistics):
                given.append(each)
                yield each[1:]

        for spec, made in method.each(members()):
            member, weight, seen = given.pop(0)
            elsewhere = shared_tensors(spec) if specs else set[str]()
            for key, tensor in zip(spec.tensors(), made, strict=True):
                if key not in elsewhere:
                    tensors[f"{member}|{key}"] = tensor
            specs.append((member, str(spec)))
            delta = weight - spec.dense(*made)
            gram, count = (torch.eye(weight.shape[1]), 1) if seen is None else (seen.gram, seen.count)
            power = float(row_error(weight, gram, count).sum())
            errors.append(float(row_error(delta, gram, count).sum()) / max(power, 1e-30))
        return sum(errors) / len(errors)

    def _members(
        self, group: Group, statistics: Mapping[str, Statistics]
    ) -> Iterator[tuple[str, Tensor, Statistics | None]]:
        """Every matrix of a group, [N, K] float32, and what it sees; a root that one has computed is all others'."""
        previous: Statistics | None = None
        for member in owners(self.stream.model, group):
            seen = statistics.get(member) or next(
                (statistics[name] for name in group.members if name in statistics), None
            )
            seen = seen if expert_of(member) is None else statistics.get(member)
            if seen is not None and previous is not None and previous.gram is seen.gram and "root" in previous.__dict__:
                seen.__dict__["root"] = previous.__dict__["root"]
            previous = seen
            yield member, matrix(self.stream.model, member).float().contiguous(), seen


def _put(model: nn.Module, stage: Stage, name: str) -> dict[str, float]:
    """Replace the modules of one part by what is on disk; returns the errors noted there."""
    note = stage.read_note(name)
    tensors = stage.read_tensors(name)
    for specs in note["specs"]:
        first, made = specs[0][0], dict[str, StoredWeight]()
        for member, text in specs:
            spec = weights.parse(text)
            shared = shared_tensors(spec)
            keys = [f"{first if key in shared else member}|{key}" for key in spec.tensors()]
            made[member] = StoredWeight(spec, [tensors[key] for key in keys])
        if shared_tensors(made[first].spec):
            share_(list(made.values()))
        for member, stored in made.items():
            replace_(model, member, stored)
    return note["errors"]


def compare_streams(stream: Stream, hidden: Tensor, calibrated: Stage) -> tuple[float, float]:
    """Mean KL(original || changed) in nats per token and top-1 agreement, for the check windows' last hidden states."""
    total = agreed = 0.0
    count = 0
    with stream.outer():
        for index in range(hidden.shape[0]):
            original = torch.log_softmax(calibrated.read_tensors(f"check-{index:03}")["log_probabilities"].float(), -1)
            changed = torch.log_softmax(stream.leave(hidden[index : index + 1])[0], -1)
            total += float(nn.functional.kl_div(changed, original, reduction="sum", log_target=True))
            agreed += float((changed.argmax(-1) == original.argmax(-1)).sum())
            count += hidden.shape[1]
    return total / count, agreed / count
