"""Exact search over stages and their replicas for one number of microbatches.

The estimate of `stages.py` is a sum over stages plus a maximum over stages. For a ceiling on the maximum, dynamic
programming over (stages, first block, devices) from the last stage to the first finds the least sum. Branch and bound
over intervals of that ceiling then finds the least sum plus maximum: a plan whose maximum lies in (low, high] has at
least the sum found for the ceiling `high`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rannc_hf.partition.segments import Floats
from rannc_hf.partition.stages import Stage, StageModel, Ways, in_flight

_NEVER = float("inf")
_BELOW = 1 - 1e-9
TOLERANCE = 2e-3
"""The search may miss a plan that is better by this share: costs are not known that well."""


@dataclass(frozen=True)
class Candidate:
    """A plan as the search sees it, with its estimated step time."""

    microbatches: int
    schedule: str
    stages: tuple[Stage, ...]
    recompute: tuple[str, ...]
    estimate_us: float


@dataclass(frozen=True)
class Limits:
    """What the search may use: at most `stages` stages, or exactly as many; or these `replicas` of each stage."""

    stages: int
    exact: bool = False
    replicas: tuple[int, ...] | None = None


def best_candidates(
    model: StageModel, schedule: str, limits: Limits, ceiling_us: float, tolerance: float = TOLERANCE
) -> list[Candidate]:
    """Candidates, the best first; where one is faster than `ceiling_us`, the best of all is among them.

    Empty where no plan faster than that fits into memory.
    """
    found: dict[tuple[Stage, ...], Candidate] = {}
    best = ceiling_us
    # (least possible estimate, low, high, least sum): plans whose maximum is in (low, high].
    low = (model.microbatches - 1) * float(model.work.sum()) / model.problem.cluster.size * _BELOW - 1e-6
    heap = [(low + model.sum_bound, low, best - model.sum_bound, model.sum_bound)]
    while heap:
        bound, low, high, _ = heapq.heappop(heap)
        if bound >= best * (1 - tolerance):
            break
        table = _Table(model, schedule, limits, min(high, best - model.sum_bound), best - low)
        sums = table.sums()
        least = float(sums.min())
        if not np.isfinite(least):
            continue
        # The least sums of a few numbers of stages: candidates for the simulation.
        order = [int(k) for k in np.argsort(sums, kind="stable")[:3] if np.isfinite(sums[k])]
        made = [table.candidate(k) for k in order]
        for candidate in made:
            found.setdefault(candidate.stages, candidate)
            best = min(best, candidate.estimate_us)
        high = min(made[0].estimate_us - least, best - least) * _BELOW
        middle = (low + high) / 2 if np.isfinite(high) else high
        for lower, upper in ((low, middle), (middle, high)):
            if lower < upper and lower + least < best * (1 - tolerance):
                heapq.heappush(heap, (lower + least, lower, upper, least))
    return sorted(found.values(), key=lambda c: (c.estimate_us, len(c.stages), c.stages))


def fits(model: StageModel, schedule: str, limits: Limits) -> bool:
    """Whether there is any plan that fits into memory."""
    return bool(np.isfinite(_Table(model, schedule, limits, _NEVER, _NEVER).sums()).any())


def even_candidates(model: StageModel, schedule: str, limits: Limits) -> list[Candidate]:
    """Plans with equally many replicas in each stage, or the wanted ones, and about equal work: a quick first bound."""
    size = model.problem.cluster.size
    if limits.replicas is not None:
        shapes = [limits.replicas]
    else:
        counts = [limits.stages] if limits.exact else range(1, limits.stages + 1)
        shapes = [(size // s,) * s for s in counts if size % s == 0 and size // s in model.replicas]
    done = np.concatenate([[0.0], np.cumsum(model.work)]) / model.work.sum()
    found = []
    for shape in shapes:
        ends = np.searchsorted(done, np.cumsum(shape) / size - 1e-9)
        ends[-1] = len(model.work)
        starts = np.concatenate([[0], ends[:-1]])
        if (ends > starts).all():
            stages = tuple(Stage(int(a), int(b) - 1, r) for a, b, r in zip(starts, ends, shape))
            candidate = make_candidate(model, schedule, stages)
            if candidate is not None:
                found.append(candidate)
    return found


def make_candidate(model: StageModel, schedule: str, stages: tuple[Stage, ...]) -> Candidate | None:
    """Stages with the cheapest recomputation that fits, and their estimate; None where nothing fits."""
    total = slowest = 0.0
    rank = 0
    recompute = []
    for index, stage in enumerate(stages):
        choice = model.recompute(stage, in_flight(schedule, len(stages), index, model.microbatches))
        if choice is None:
            return None
        added, part = model.terms(stage, model.problem.ways(rank, stage.replicas), choice, schedule)
        total, slowest, rank = total + added, max(slowest, part), rank + stage.replicas
        recompute.append(choice)
    return Candidate(model.microbatches, schedule, stages, tuple(recompute), total + slowest)


class _Table:
    """[k, i, d]: least sum of k stages that run blocks i and later on the last d devices (in units of `unit`).

    Entries from which no plan with a maximum of at most `cap` and a sum of at most `budget` can come are infinite.
    """

    def __init__(self, model: StageModel, schedule: str, limits: Limits, cap: float, budget: float) -> None:
        self.model, self.schedule, self.limits, self.cap, self.budget = model, schedule, limits, cap, budget
        size = model.problem.cluster.size
        self.unit = int(np.gcd.reduce([*model.replicas, size]))
        self.devices = size // self.unit
        self.blocks = model.problem.segments.count
        self.table = np.full((limits.stages + 1, self.blocks + 1, self.devices + 1), _NEVER)
        self.table[0, self.blocks, 0] = 0.0
        self.deepest = 0
        self.groups = [self._groups(r) for r in model.replicas]
        # Work of the blocks before i, and the devices that it and the rest need at least under the ceiling.
        self.before = np.concatenate([[0.0], np.cumsum(model.work)])
        each = cap / (model.microbatches - 1) * self.unit if model.microbatches > 1 else _NEVER
        self.least = np.ceil((self.before[-1] - self.before) / each - 1e-6).astype(int)
        self.most = np.floor(self.devices - self.before / each + 1e-6).astype(int)
        for i in range(self.blocks - 1, -1, -1):
            self._fill(i)

    def sums(self) -> Floats:
        """[k] least sum with k stages on all devices."""
        sums = self.table[:, 0, self.devices].copy()
        if self.limits.exact:
            sums[: self.limits.stages] = _NEVER
        return sums

    def _groups(self, replicas: int) -> list[tuple[Ways, range]]:
        """Numbers of devices from this stage on, as ranges within which the stage uses the same links."""
        groups: list[tuple[Ways, range]] = []
        size = self.model.problem.cluster.size
        for d in range(replicas // self.unit, self.devices + 1):
            ways = self.model.problem.ways(size - d * self.unit, replicas)
            if groups and groups[-1][0] == ways:
                groups[-1] = (ways, range(groups[-1][1].start, d + 1))
            else:
                groups.append((ways, range(d, d + 1)))
        return groups

    def _in_flight(self, k: int) -> int:
        # The k-th stage from the end has k - 1 stages after it.
        return in_flight(self.schedule, k, 0, self.model.microbatches)

    def _rows(self, i: int, ways: Ways, deepest: int) -> Floats:
        """[k - 1, r, j - i] for k = 1 to `deepest`."""
        levels = [self._in_flight(k) for k in range(1, deepest + 1)]
        distinct = sorted(set(levels))
        rows = self.model.rows(i, ways, distinct, self.schedule, self.cap)
        rows = rows[[distinct.index(level) for level in levels]]
        if self.limits.replicas is not None:
            for k, wanted in zip(range(deepest), reversed(self.limits.replicas)):
                rows[k, [r != wanted for r in self.model.replicas]] = _NEVER
        return rows

    def _fill(self, i: int) -> None:
        rows: dict[Ways, Floats] = {}
        deepest = min(self.limits.stages, self.deepest + 1)
        least, most = (self.devices, self.devices) if i == 0 else (max(1, self.least[i]), self.most[i])
        for index, replicas in enumerate(self.model.replicas):
            width = replicas // self.unit
            for ways, devices in self.groups[index]:
                start, stop = max(devices.start, least), min(devices.stop, most + 1)
                if start >= stop:
                    continue
                if ways not in rows:
                    rows[ways] = self._rows(i, ways, deepest)
                added = rows[ways][:, index]
                # What fits deep in the pipeline also fits as its last stage.
                hopeful = added[:1] if self.limits.replicas is None else added
                possible = np.flatnonzero(np.isfinite(hopeful).any(axis=0))
                if len(possible):
                    first, last = i + 1 + int(possible[0]), i + 2 + int(possible[-1])
                    rest = self.table[:deepest, first:last, start - width : stop - width]
                    target = self.table[1 : deepest + 1, i, start:stop]
                    sums = added[:, possible[0] : possible[-1] + 1, None] + rest
                    np.minimum(target, sums.min(axis=1), out=target)
        self._prune(i)

    def _prune(self, i: int) -> None:
        """Drop what cannot become a plan within the budget, whatever the stages before block i are."""
        left = (self.devices - np.arange(self.devices + 1)) * self.unit
        if i > 0:
            # Stages with work w and replicas r take w / r each, together at least all work over all devices.
            rest = self.before[i] / np.maximum(left, 1e-9)
            entries = self.table[:, i]
            entries[entries + rest > self.budget] = _NEVER
        finite = np.flatnonzero(np.isfinite(self.table[:, i]).any(axis=1))
        if len(finite):
            self.deepest = max(self.deepest, int(finite[-1]))

    # -- reading a plan out ------------------------------------------------------------------------------------------

    def candidate(self, stages: int) -> Candidate:
        """The plan with `stages` stages that has the least sum."""
        made = make_candidate(self.model, self.schedule, tuple(self._walk(stages)))
        assert made is not None
        return made

    def _walk(self, stages: int) -> Iterator[Stage]:
        i, d, size = 0, self.devices, self.model.problem.cluster.size
        for k in range(stages, 0, -1):
            for index, replicas in enumerate(self.model.replicas):
                width = replicas // self.unit
                if width > d or (self.limits.replicas is not None and replicas != self.limits.replicas[-k]):
                    continue
                ways = self.model.problem.ways(size - d * self.unit, replicas)
                added = self.model.rows(i, ways, [self._in_flight(k)], self.schedule, self.cap)[0, index]
                sums = added + self.table[k - 1, i + 1 : i + 1 + len(added), d - width]
                hits = np.flatnonzero(sums == self.table[k, i, d])
                if len(hits):
                    j = i + int(hits[0])
                    yield Stage(i, j, replicas)
                    i, d = j + 1, d - width
                    break
            else:
                raise AssertionError((stages, k, i, d))
