"""Exact search over stages, replicas and how stages run, for one number of microbatches.

The estimate of `stages.py` is a sum over stages plus a maximum over stages. For a ceiling on the maximum, dynamic
programming from the last stage to the first finds the least sum (`tables.py`). Branch and bound over intervals of that
ceiling then finds the least sum plus maximum: a plan whose maximum lies in (low, high] has at least the sum found for
the ceiling `high`. A quick table that knows neither the order of stages nor their ranks bounds the sum first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from rannc_hf.partition.candidate import Candidate, make_candidate
from rannc_hf.partition.problem import Stage
from rannc_hf.partition.stages import StageModel
from rannc_hf.partition.tables import Bound, Limits, Table

_NEVER = float("inf")
_BELOW = 1 - 1e-9
_KEPT = 3
"""Numbers of stages of which a table gives its best plan."""
TOLERANCE = 2e-3
"""The search may miss a plan that is better by this share: costs are not known that well."""


def best_candidates(
    model: StageModel, schedule: str, limits: Limits, ceiling_us: float, tolerance: float = TOLERANCE
) -> list[Candidate]:
    """Candidates, the best first; where one is faster than `ceiling_us`, the best of all is among them.

    Empty where no plan faster than that fits into memory.
    """
    search = _Search(model, schedule, limits, ceiling_us, tolerance)
    low = (model.microbatches - 1) * float(model.work.sum()) / model.problem.cluster.size * _BELOW - 1e-6
    least = dict.fromkeys(model.placements, model.sum_bound)
    # (least possible estimate, low, high, least sum of each placement): plans whose maximum is in (low, high].
    heap = [(low + model.sum_bound, low, ceiling_us - model.sum_bound, tuple(least.items()))]
    while heap:
        bound, low, high, known = heapq.heappop(heap)
        if search.hopeless(bound):
            break
        least = search.try_interval(low, high, dict(known))
        # With a larger maximum they are not better than the best by more than the tolerance.
        high = min(high, search.best * (1 - tolerance) - min(least.values())) * _BELOW
        middle = (low + high) / 2 if np.isfinite(high) else high
        for lower, upper in ((low, middle), (middle, high)):
            bound = lower + min(least.values())
            if lower < upper and not search.hopeless(bound):
                heapq.heappush(heap, (bound, lower, upper, tuple(least.items())))
    return sorted(search.found.values(), key=lambda c: (c.estimate_us, len(c.stages), c.stages, c.placement))


def fits(model: StageModel, schedule: str, limits: Limits) -> bool:
    """Whether there is any plan that fits into memory."""
    bound = Bound(model, schedule, limits, _NEVER, _NEVER)
    if not np.isfinite(bound.least):
        return False
    placements = model.placements
    if any(make_candidate(model, schedule, p, stages) for p in placements for stages in bound.plans(p)):
        return True
    return any(np.isfinite(Table(model, schedule, p, limits, _NEVER, _NEVER).sums()).any() for p in placements)


class _Search:
    def __init__(self, model: StageModel, schedule: str, limits: Limits, best: float, tolerance: float) -> None:
        self.model, self.schedule, self.limits = model, schedule, limits
        self.best, self.tolerance = best, tolerance
        self.found: dict[tuple[str, tuple[Stage, ...]], Candidate] = {}

    def hopeless(self, bound: float) -> bool:
        return bound >= self.best * (1 - self.tolerance)

    def keep(self, candidate: Candidate | None) -> None:
        if candidate is not None:
            self.found.setdefault((candidate.placement, candidate.stages), candidate)
            self.best = min(self.best, candidate.estimate_us)

    def try_interval(self, low: float, high: float, known: dict[str, float]) -> dict[str, float]:
        """Look for plans whose maximum is in (low, high].

        Returns for each placement the least sum of any plan with a maximum of at most `high`, or less; infinite where
        none of those can be the best. `known` are such sums for a larger `high`.
        """
        model, best = self.model, self.best
        cap, budget = min(high, best - model.sum_bound), best - low
        bound = Bound(model, self.schedule, self.limits, cap, budget)
        least = {p: max(sum_, bound.least) for p, sum_ in known.items()}
        for placement in least:
            if not self.hopeless(low + least[placement]):
                for stages in bound.plans(placement):
                    self.keep(make_candidate(model, self.schedule, placement, stages))
        for placement in least:
            if self.hopeless(low + least[placement]):
                least[placement] = _NEVER
                continue
            table = Table(model, self.schedule, placement, self.limits, cap, budget)
            sums = table.sums()
            # The least sums of a few numbers of stages: candidates for the simulation.
            order = [int(k) for k in np.argsort(sums, kind="stable")[:_KEPT] if np.isfinite(sums[k])]
            for k in order:
                self.keep(make_candidate(model, self.schedule, placement, tuple(table.walk(k))))
            least[placement] = float(sums[order[0]]) if order else _NEVER
        return least


def even_candidates(model: StageModel, schedule: str, limits: Limits) -> Iterator[Candidate]:
    """Plans with equally many replicas in each stage, or the wanted ones, and about equal work: a quick first bound."""
    size = model.problem.cluster.size
    if limits.replicas is not None:
        shapes = [limits.replicas]
    else:
        counts = [limits.stages] if limits.exact else range(1, limits.stages + 1)
        shapes = [(size // s,) * s for s in counts if size % s == 0 and size // s in model.replicas]
    done = np.concatenate([[0.0], np.cumsum(model.work)]) / model.work.sum()
    for shape in shapes:
        ends = np.searchsorted(done, np.cumsum(shape) / size - 1e-9)
        ends[-1] = len(model.work)
        starts = np.concatenate([[0], ends[:-1]])
        if (ends > starts).all():
            stages = tuple(Stage(int(a), int(b) - 1, r) for a, b, r in zip(starts, ends, shape))
            for placement in model.placements:
                if set(shape) <= set(model.placements[placement]):
                    candidate = make_candidate(model, schedule, placement, stages)
                    if candidate is not None:
                        yield candidate
