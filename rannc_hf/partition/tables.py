"""Dynamic programming over first block and devices, from the last stage to the first, under a ceiling.

Legend: i first block, k number of stages from block i on, d devices they use, in units that all numbers of replicas
are multiples of. Entries from which no plan with a maximum of at most `cap` and a sum of at most `budget` can come are
infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rannc_hf.partition.memory import Floats
from rannc_hf.partition.options import Links
from rannc_hf.partition.problem import Stage
from rannc_hf.partition.schedules import in_flight
from rannc_hf.partition.stages import StageModel

_NEVER = float("inf")


@dataclass(frozen=True)
class Limits:
    """What the search may use: at most `stages` stages, or exactly as many; or these `replicas` of each stage."""

    stages: int
    exact: bool = False
    replicas: tuple[int, ...] | None = None


def _added(model: StageModel, links: Links, schedule: str, i: int, levels: Sequence[int], cap: float) -> Floats:
    """[row, level or 1, j - i] the least that stages from block i on add with a part of the maximum of at most `cap`.

    Infinite where it does not fit with `levels[level]` microbatches in flight (in increasing order).
    """
    options = model.options(i, links, schedule)
    roomy = np.where(options.roomy_slowest <= cap, options.roomy_added, _NEVER)
    length = max(roomy.shape[2], options.added.shape[2])
    # One level stands for all as long as memory suffices for all of them alike.
    depth = len(levels) if len(options.added) else 1
    result = np.full((len(links.rows), depth, length), _NEVER)
    if len(roomy):
        result[:, :, : roomy.shape[2]] = roomy.min(axis=0)[:, None]
    for added, slowest, flight in zip(options.added, options.slowest, options.flight):
        usable = np.where(slowest <= cap, added, _NEVER)[:, None]
        part = result[:, :, : added.shape[1]]
        np.minimum(part, np.where(flight[:, None] >= np.array(levels)[:, None], usable, _NEVER), out=part)
    last = np.flatnonzero(np.isfinite(result[:, 0]).any(axis=0))
    return result[:, :, : int(last[-1]) + 1 if len(last) else 0]


class _Bands:
    """Devices that blocks i and later can and must use: those before and after need enough under the ceiling too."""

    def __init__(self, model: StageModel, unit: int, cap: float, budget: float) -> None:
        self.devices, self.unit, self.budget = model.problem.cluster.size // unit, unit, budget
        self.before = np.concatenate([[0.0], np.cumsum(model.work)])
        each = cap / (model.microbatches - 1) * unit if model.microbatches > 1 else _NEVER
        self.least = np.maximum(1, np.ceil((self.before[-1] - self.before) / each - 1e-6)).astype(int)
        self.most = np.floor(self.devices - self.before / each + 1e-6).astype(int)
        self.least[0] = self.most[0] = self.devices

    def of(self, i: int) -> range:
        return range(int(self.least[i]), int(self.most[i]) + 1)

    def hopeless(self, i: int, entries: Floats) -> npt.NDArray[np.bool_]:
        """Which sums `entries` [..., d] of blocks i and later exceed the budget, whatever comes before."""
        left = (self.devices - np.arange(self.devices + 1)) * self.unit
        # Stages with work w and replicas r take w / r each, together at least all work over all devices.
        rest = self.before[i] / np.maximum(left, 1e-9) if i else 0.0
        return np.asarray(entries + rest > self.budget)


class Bound:
    """Least sum where stages may follow each other in any order, on the fastest links, with the last one's memory.

    Any plan's sum is at least as large, and often the plan behind it is one.
    """

    def __init__(self, model: StageModel, schedule: str, limits: Limits, cap: float, budget: float) -> None:
        self.model, self.limits, self.cap = model, limits, cap
        self.blocks = model.problem.segments.count
        self.widths = np.array(model.replicas) // model.unit
        self.level = in_flight(schedule, 0, 1, model.microbatches)
        self.schedule = schedule
        bands = _Bands(model, model.unit, cap, budget)
        self.devices, self.most = bands.devices, int(self.widths.max())
        # [i, most + d]: entries left of `most` stand for fewer devices than none.
        self.table = np.full((self.blocks + 1, self.most + self.devices + 1), _NEVER)
        self.table[self.blocks, self.most] = 0.0
        windows = np.lib.stride_tricks.sliding_window_view(self.table, self.devices + 1, axis=1)
        for i in range(self.blocks - 1, -1, -1):
            band = bands.of(i)
            added = _added(model, model.best_links, schedule, i, [self.level], cap)[: len(self.widths), 0]
            if not added.shape[1] or not len(band):
                continue
            rest = windows[i + 1 : i + 1 + added.shape[1], self.most - self.widths, band.start : band.stop]
            sums = (added.T[:, :, None] + rest).reshape(-1, len(band)).min(axis=0)
            row = self.table[i, self.most :]
            row[band.start : band.stop] = sums
            row[bands.hopeless(i, row)] = _NEVER
        self.least = float(self.table[0, self.most + self.devices])

    def plans(self, placement: str) -> Iterator[tuple[Stage, ...]]:
        """The plan behind the least sum, if it is one."""
        if not np.isfinite(self.least):
            return
        stages = tuple(self._walk())
        shape = tuple(s.replicas for s in stages)
        possible = set(shape) <= set(self.model.placements[placement]) and len(stages) <= self.limits.stages
        if self.limits.exact and len(stages) != self.limits.stages:
            possible = False
        if possible and self.limits.replicas in (None, shape):
            yield stages

    def _walk(self) -> Iterator[Stage]:
        i, d = 0, self.devices
        while i < self.blocks:
            added = _added(self.model, self.model.best_links, self.schedule, i, [self.level], self.cap)
            added = added[: len(self.widths), 0]
            rest = self.table[i + 1 : i + 1 + added.shape[1], self.most + d - self.widths].T
            r, length = np.unravel_index(int(np.argmin(added + rest)), added.shape)
            yield Stage(i, i + int(length), self.model.replicas[r])
            i, d = i + int(length) + 1, d - int(self.widths[r])


class Table:
    """Least sums of plans with a placement, by their number of stages."""

    def __init__(
        self, model: StageModel, schedule: str, placement: str, limits: Limits, cap: float, budget: float
    ) -> None:
        self.model, self.schedule, self.limits, self.cap = model, schedule, limits, cap
        self.size, self.blocks = model.problem.cluster.size, model.problem.segments.count
        self.replicas = model.placements[placement]
        self.unit = math.gcd(*self.replicas, self.size)
        self.widths = np.array(self.replicas) // self.unit
        self.bands = _Bands(model, self.unit, cap, budget)
        self.devices = self.bands.devices
        self.table = np.full((self.devices + 1, limits.stages + 1, self.blocks + 1), _NEVER)
        """[d, k, i]"""
        self.table[0, 0, self.blocks] = 0.0
        self.deepest = 0
        self.links, self.row_of = model.links_of(placement)
        for i in range(self.blocks - 1, -1, -1):
            self._fill(i)

    def _level(self, k: int) -> int:
        return in_flight(self.schedule, 0, k, self.model.microbatches)

    def _added(self, i: int, levels: Sequence[int]) -> Floats:
        return _added(self.model, self.links, self.schedule, i, levels, self.cap)

    def _rows(self, d: int) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]:
        """The numbers of replicas of a first stage, when `d` devices are left: their widths, and their rows."""
        widths = self.widths[self.widths <= d]
        return widths, self.row_of[(self.size - d * self.unit) % len(self.row_of), : len(widths)]

    def _fill(self, i: int) -> None:
        band = self.bands.of(i)
        deepest = min(self.limits.stages, self.deepest + 1)
        levels = [self._level(k) for k in range(1, deepest + 1)]
        distinct = sorted(set(levels))
        added = self._added(i, distinct) if len(band) else np.zeros((0, 0, 0))
        if not added.size:
            return
        if 1 < added.shape[1] < len(levels):
            added = added[:, [distinct.index(level) for level in levels]]
        for d in band:
            widths, rows = self._rows(d)
            rest = self.table[d - widths, :deepest, i + 1 : i + 1 + added.shape[2]]
            sums = (added[rows] + rest).min(axis=2, initial=_NEVER)
            if self.limits.replicas is not None:
                wanted = np.array(self.limits.replicas[::-1][:deepest])
                sums[np.array(self.replicas)[: len(widths), None] != wanted] = _NEVER
            self.table[d, 1 : deepest + 1, i] = sums.min(axis=0, initial=_NEVER)
        self._prune(i)

    def _prune(self, i: int) -> None:
        entries = self.table[:, :, i]
        entries[self.bands.hopeless(i, entries.T).T] = _NEVER
        if i > 0 and not self.limits.exact:
            # With more stages behind them, those before hold more microbatches: fewer stages with no larger sum win.
            fewer = np.minimum.accumulate(entries, axis=1)[:, :-1]
            entries[:, 1:][entries[:, 1:] >= fewer] = _NEVER
        finite = np.flatnonzero(np.isfinite(entries).any(axis=0))
        if len(finite):
            self.deepest = max(self.deepest, int(finite[-1]))

    def sums(self) -> Floats:
        """[k] least sum with k stages on all devices."""
        sums = self.table[self.devices, :, 0].copy()
        if self.limits.exact:
            sums[: self.limits.stages] = _NEVER
        return sums

    def walk(self, stages: int) -> Iterator[Stage]:
        """The plan with `stages` stages that has the least sum."""
        i, d = 0, self.devices
        for k in range(stages, 0, -1):
            added = self._added(i, [self._level(k)])[:, 0]
            widths, rows = self._rows(d)
            rest = self.table[d - widths, k - 1, i + 1 : i + 1 + added.shape[1]]
            sums = added[rows] + rest
            if self.limits.replicas is not None:
                sums[np.array(self.replicas)[: len(widths)] != self.limits.replicas[-k]] = _NEVER
            r, length = np.unravel_index(int(np.argmin(sums)), sums.shape)
            yield Stage(i, i + int(length), self.replicas[r])
            i, d = i + int(length) + 1, d - int(widths[r])
