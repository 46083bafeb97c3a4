"""Interleaved candidates: a few even cuts for each number of groups of ranks and laps over them.

Groups have equally many ranks, or those that the options give. The stages are cut so that the longest takes the least
time; the promising shapes are simulated. This is no exact search: what wins is still predicted like any other plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from rannc_hf.config import RanncConfig
from rannc_hf.partition.candidate import Candidate
from rannc_hf.partition.memory import Floats
from rannc_hf.partition.placement import stage_ranks
from rannc_hf.partition.problem import Choice, Problem, Stage
from rannc_hf.partition.rank import Outcome, peaks, simulate_on
from rannc_hf.partition.schedules import INTERLEAVED
from rannc_hf.partition.stages import StageModel

LAPS = (2, 3, 4)
"""How many stages each rank may run."""
_TRIED = 12
"""How many shapes are simulated."""
_MOST_COMPUTES = 1 << 14
"""Shapes with more forwards than this in a step are left out: simulating them takes seconds."""


class _Shape(NamedTuple):
    estimate_us: float
    bound_us: float
    """No such plan is faster."""
    microbatches: int
    placement: str
    replicas: tuple[int, ...]
    laps: int
    stages: tuple[Stage, ...]


def wants_interleaved(config: RanncConfig) -> bool:
    """Whether the options ask for interleaved plans, or leave them open; numbers of stages are of other plans."""
    return config.schedule == INTERLEAVED or (config.schedule, config.stages, config.replicas) == ("auto",) * 3


def interleaved(problem: Problem, models: Mapping[int, StageModel], best_us: float) -> list[Outcome]:
    """Simulated interleaved plans that fit into memory, of those that may be faster than `best_us`."""
    found = []
    promising = [model for model in models.values() if model.step_bound < best_us]
    shapes = sorted(s for model in promising for s in _shapes(problem, model) if s.bound_us < best_us)
    for shape in shapes[:_TRIED]:
        if shape.bound_us >= best_us:
            continue
        model = models[shape.microbatches]
        ranks = tuple(stage_ranks(problem.cluster, shape.placement, shape.replicas)) * shape.laps
        for choice in _fitting(problem, model, shape):
            choices = tuple(Choice(choice.recompute, choice.shard if s.replicas > 1 else "none") for s in shape.stages)
            times, simulation = simulate_on(model, INTERLEAVED, shape.stages, choices, ranks)
            candidate = Candidate(
                shape.microbatches, INTERLEAVED, shape.placement, shape.stages, choices, simulation.step_us
            )
            found.append(Outcome(model, candidate, ranks, times, simulation))
            best_us = min(best_us, simulation.step_us)
    return found


def _shapes(problem: Problem, model: StageModel) -> Iterator[_Shape]:
    blocks, microbatches = len(model.work), model.microbatches
    shapes = [(r, laps) for r in _replicas(problem, model) for laps in LAPS if len(r) * laps <= blocks]
    shapes = [(r, laps) for r, laps in shapes if len(r) * laps * microbatches <= _MOST_COMPUTES]
    ends = _even_cuts(model.work, max((len(r) * laps for r, laps in shapes), default=0))
    for replicas, laps in shapes:
        bounds = [0, *ends[len(replicas) * laps]]
        stages = tuple(Stage(a, b - 1, r) for a, b, r in zip(bounds, bounds[1:], replicas * laps))
        rows = [model.replicas.index(r) for r in replicas]
        each = model.forward + model.backward
        computed = [
            sum(float(each[row, s.first : s.last + 1].sum()) for s in stages[group :: len(replicas)])
            for group, row in enumerate(rows)
        ]
        # A group begins when a microbatch has come through those before it, and its last one has to go back.
        first_lap = [float(each[row, s.first : s.last + 1].sum()) for row, s in zip(rows, stages)]
        waits = np.concatenate([[0.0], np.cumsum(first_lap)[:-1]])
        bound = float((microbatches * np.array(computed) + waits).max())
        estimate = (microbatches + (len(replicas) - 1) / laps) * max(computed)
        for placement, allowed in model.placements.items():
            if set(replicas) <= set(allowed):
                yield _Shape(estimate, bound, microbatches, placement, replicas, laps, stages)


def _replicas(problem: Problem, model: StageModel) -> list[tuple[int, ...]]:
    """Replicas of each group of ranks."""
    config, size = problem.config, problem.cluster.size
    if config.replicas != "auto":
        return [config.replicas] if len(config.replicas) > 1 and set(config.replicas) <= set(model.replicas) else []
    counts = [r for r in model.replicas if size % r == 0 and size // r > 1]
    return [(r,) * (size // r) for r in counts if config.stages in ("auto", size // r)]


def _even_cuts(work: Floats, most: int) -> dict[int, list[int]]:
    """For each number of parts up to `most`, the ends (exclusive) of those whose largest is the least."""
    done = np.concatenate([[0.0], np.cumsum(work)])
    lengths = np.where(np.triu(np.ones((len(done), len(done)), dtype=bool), 1), done[None] - done[:, None], np.inf)
    # least[j]: the largest of the parts before block j; begins[k][j]: where the last of them begins.
    least, begins, result = lengths[0], [np.zeros(len(done), dtype=int)], {1: [len(work)]}
    for parts in range(2, most + 1):
        largest = np.maximum(least[:, None], lengths)
        begins.append(largest.argmin(axis=0))
        least = largest.min(axis=0)
        ends = [len(work)]
        for k in reversed(range(1, parts)):
            ends.append(int(begins[k][ends[-1]]))
        result[parts] = ends[::-1]
    return result


def _fitting(problem: Problem, model: StageModel, shape: _Shape) -> Iterator[Choice]:
    """Ways to run all stages that fit into memory; computing again only where it is needed."""
    plain: set[str] = set()
    for choice in sorted(problem.choices, key=lambda c: c.recompute != "none"):
        if choice.shard in plain or not any(problem.allows(choice.shard, r) for r in shape.replicas):
            continue
        alone = Choice(choice.recompute, "none")
        choices = [choice if s.replicas > 1 else alone for s in shape.stages]
        if max(peaks(model, INTERLEAVED, shape.stages, choices, len(shape.replicas))) <= problem.memory_bytes:
            plain.add(choice.shard)
            yield choice
