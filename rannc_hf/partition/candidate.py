"""`Candidate`: a plan as the search sees it, and how one is made from stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rannc_hf.partition.problem import Choice, Stage
from rannc_hf.partition.schedules import in_flight
from rannc_hf.partition.stages import StageModel

_NEVER = float("inf")


@dataclass(frozen=True)
class Candidate:
    """Stages with how they run, and the estimated step time."""

    microbatches: int
    schedule: str
    placement: str
    stages: tuple[Stage, ...]
    choices: tuple[Choice, ...]
    estimate_us: float

    @property
    def replicas(self) -> tuple[int, ...]:
        return tuple(s.replicas for s in self.stages)

    @property
    def recompute(self) -> tuple[str, ...]:
        return tuple(c.recompute for c in self.choices)

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(c.shard for c in self.choices)


def make_candidate(model: StageModel, schedule: str, placement: str, stages: tuple[Stage, ...]) -> Candidate | None:
    """Stages with the choices that give the least estimate of those that fit; None where nothing fits."""
    options = []
    first = 0
    for index, stage in enumerate(stages):
        held = in_flight(schedule, index, len(stages), model.microbatches)
        way = model.problem.way(placement, first, stage.replicas)
        fitting = model.choices(stage, way, schedule, held)
        if not fitting:
            return None
        options.append(fitting)
        first += stage.replicas
    width = max(map(len, options))
    added, slowest = np.full((len(stages), width), _NEVER), np.full((len(stages), width), _NEVER)
    for index, fitting in enumerate(options):
        added[index, : len(fitting)] = [a for _, a, _ in fitting]
        slowest[index, : len(fitting)] = [s for _, _, s in fitting]
    # For each possible maximum, the least sum below it.
    ceilings = np.unique(slowest[np.isfinite(slowest)])
    within = np.where(slowest[None] <= ceilings[:, None, None], added[None], _NEVER)
    totals = within.min(axis=2).sum(axis=1) + ceilings
    best = int(np.argmin(totals))
    picked = within[best].argmin(axis=1)
    choices = tuple(fitting[int(k)][0] for fitting, k in zip(options, picked))
    estimate = float(sum(added[i, k] for i, k in enumerate(picked)) + max(slowest[i, k] for i, k in enumerate(picked)))
    return Candidate(model.microbatches, schedule, placement, stages, choices, estimate)
