"""Exact search over stages and their replicas for one number of microbatches.

The estimate of `stages.py` is a sum over stages plus a maximum over stages. For a ceiling on the maximum, dynamic
programming over (stages, first block, devices) from the last stage to the first finds the least sum. Lowering the
ceiling below what the found plan reaches, until nothing better can remain, visits all plans that are optimal for some
weight of the two terms: the least estimate is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rannc_hf.partition.segments import Floats
from rannc_hf.partition.stages import Stage, StageModel, Ways, in_flight

_NEVER = float("inf")
_BELOW = 1 - 1e-9


@dataclass(frozen=True)
class Candidate:
    """A plan as the search sees it, with its estimated step time."""

    microbatches: int
    stages: tuple[Stage, ...]
    recompute: tuple[str, ...]
    estimate_us: float


@dataclass(frozen=True)
class Limits:
    """What the search may use: at most `stages` stages, or exactly as many; or these `replicas` of each stage."""

    stages: int
    exact: bool = False
    replicas: tuple[int, ...] | None = None


def best_candidates(model: StageModel, schedule: str, limits: Limits, ceiling_us: float) -> list[Candidate]:
    """Candidates below `ceiling_us`, the best first; the best of all plans is the first.

    `schedule` decides how many microbatches are in flight. Empty where no plan below the ceiling fits.
    """
    found: dict[tuple[Stage, ...], Candidate] = {}
    best = ceiling_us
    cap = best - model.fill_bound
    while cap > 0:
        table = _Table(model, schedule, limits, cap)
        sums = table.sums()
        if not np.isfinite(sums).any():
            break
        least = float(sums.min())
        if least >= best:
            break
        # The least sum of a few numbers of stages: candidates for the simulation.
        for stages in np.argsort(sums, kind="stable")[:3]:
            if np.isfinite(sums[stages]):
                candidate = table.candidate(int(stages))
                found.setdefault(candidate.stages, candidate)
                best = min(best, candidate.estimate_us)
        # What remains has at least this sum, so it needs a smaller maximum.
        cap = min(cap, best - least) * _BELOW
    return sorted(found.values(), key=lambda c: (c.estimate_us, len(c.stages), c.stages))


def fits(model: StageModel, schedule: str, limits: Limits) -> bool:
    """Whether there is any plan that fits into memory."""
    return bool(np.isfinite(_Table(model, schedule, limits, _NEVER).sums()).any())


class _Table:
    """[k, i, d]: least sum of k stages that run blocks i and later on the last d devices."""

    def __init__(self, model: StageModel, schedule: str, limits: Limits, cap: float) -> None:
        self.model, self.schedule, self.limits, self.cap = model, schedule, limits, cap
        self.unit = int(np.gcd.reduce([*model.replicas, model.problem.cluster.size]))
        self.devices = model.problem.cluster.size // self.unit
        self.blocks = model.problem.segments.count
        self.most = limits.stages
        self.table = np.full((self.most + 1, self.blocks + 1, self.devices + 1), _NEVER)
        self.table[0, self.blocks, 0] = 0.0
        self.groups = [self._groups(r) for r in model.replicas]
        for i in range(self.blocks - 1, -1, -1):
            self._fill(i)

    def sums(self) -> Floats:
        """[k] least sum with k stages on all devices."""
        sums = self.table[:, 0, self.devices].copy()
        if self.limits.exact:
            sums[: self.most] = _NEVER
        return sums

    def _groups(self, replicas: int) -> list[tuple[Ways, list[int]]]:
        """Numbers of devices (in units) from this stage on, grouped by the links that the stage then uses."""
        groups: dict[Ways, list[int]] = {}
        size = self.model.problem.cluster.size
        for d in range(replicas // self.unit, self.devices + 1):
            groups.setdefault(self.model.problem.ways(size - d * self.unit, replicas), []).append(d)
        return list(groups.items())

    def _in_flight(self, k: int) -> int:
        # The k-th stage from the end has k - 1 stages after it.
        return in_flight(self.schedule, k, 0, self.model.microbatches)

    def _rows(self, i: int, ways: Ways) -> Floats:
        """[k, r, j - i] for k = 1 to the most stages; k has one entry where it does not matter."""
        levels = sorted({self._in_flight(k) for k in range(1, self.most + 1)})
        model = self.model
        if bool(np.all(model.flight_none[i, :, i:] >= levels[-1])):
            levels = levels[-1:]
        by_level = {h: model.rows(i, ways, h, self.cap) for h in levels}
        if len(levels) == 1 and self.limits.replicas is None:
            return by_level[levels[0]][None]
        last = levels[-1]
        rows = np.stack([by_level.get(self._in_flight(k), by_level[last]) for k in range(1, self.most + 1)])
        if self.limits.replicas is not None:
            for k, wanted in enumerate(reversed(self.limits.replicas)):
                for index, r in enumerate(model.replicas):
                    if r != wanted:
                        rows[k, index] = _NEVER
        return rows

    def _fill(self, i: int) -> None:
        rows: dict[Ways, Floats] = {}
        for index, replicas in enumerate(self.model.replicas):
            width = replicas // self.unit
            for ways, devices in self.groups[index]:
                if ways not in rows:
                    rows[ways] = self._rows(i, ways)
                added = rows[ways][:, index]
                possible = np.flatnonzero(np.isfinite(added).any(axis=0))
                if len(possible):
                    self._relax(i, added[:, possible[0] : possible[-1] + 1], i + 1 + int(possible[0]), width, devices)

    def _relax(self, i: int, added: Floats, after: int, width: int, devices: list[int]) -> None:
        stop = after + added.shape[1]
        if devices == list(range(devices[0], devices[-1] + 1)):
            rest = self.table[:-1, after:stop, devices[0] - width : devices[-1] + 1 - width]
            target = self.table[1:, i, devices[0] : devices[-1] + 1]
            np.minimum(target, (added[:, :, None] + rest).min(axis=1), out=target)
        else:
            rest = self.table[:-1, after:stop, [d - width for d in devices]]
            columns = self.table[1:, i, devices]
            self.table[1:, i, devices] = np.minimum(columns, (added[:, :, None] + rest).min(axis=1))

    # -- reading a plan out ------------------------------------------------------------------------------------------

    def candidate(self, stages: int) -> Candidate:
        """The plan with `stages` stages that has the least sum."""
        chosen = tuple(self._walk(stages))
        return candidate(self.model, self.schedule, chosen)

    def _walk(self, stages: int) -> Iterator[Stage]:
        i, d = 0, self.devices
        for k in range(stages, 0, -1):
            target = self.table[k, i, d]
            for index, replicas in enumerate(self.model.replicas):
                width = replicas // self.unit
                if width > d:
                    continue
                ways = self.model.problem.ways(self.model.problem.cluster.size - d * self.unit, replicas)
                if self.limits.replicas is not None and replicas != self.limits.replicas[len(self.limits.replicas) - k]:
                    continue
                added = self.model.rows(i, ways, self._in_flight(k), self.cap)[index]
                hits = np.flatnonzero(added + self.table[k - 1, i + 1 :, d - width] == target)
                if len(hits):
                    j = i + int(hits[0])
                    yield Stage(i, j, replicas)
                    i, d = j + 1, d - width
                    break
            else:
                raise AssertionError((stages, k, i, d))


def candidate(model: StageModel, schedule: str, stages: tuple[Stage, ...]) -> Candidate:
    """Stages with the cheapest recomputation that fits, and their estimate."""
    total = slowest = 0.0
    rank = 0
    recompute = []
    for index, stage in enumerate(stages):
        choice = model.recompute(stage, in_flight(schedule, len(stages), index, model.microbatches))
        assert choice is not None, (stages, index)
        added, part = model.terms(stage, model.problem.ways(rank, stage.replicas), choice)
        total, slowest, rank = total + added, max(slowest, part), rank + stage.replicas
        recompute.append(choice)
    return Candidate(model.microbatches, stages, tuple(recompute), total + slowest)
