"""`find_plan`: the fastest plan for a graph on a cluster.

For each number of microbatches, exact dynamic programming over stages and replicas (`dp.py`) on estimated times; the
best candidates of all, and a few interleaved ones, are then simulated event by event, and the best simulated one wins.
So do parts of the cluster, where one may be faster (`fewer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from rannc_hf.capture.graph import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.cost.table import CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.explain import explain_failure, explain_idle, explain_plan, why_slower
from rannc_hf.partition.fewer import least_work_us, may_be_faster, parts
from rannc_hf.partition.interleave import interleaved, wants_interleaved
from rannc_hf.partition.plan import Plan, RunnerUp, StagePlan
from rannc_hf.partition.problem import Problem
from rannc_hf.partition.rank import Outcome, fastest_first, peaks, rank
from rannc_hf.partition.space import PlanError, check_options, search
from rannc_hf.partition.stages import StageModel

__all__ = ["PlanError", "find_plan"]

_SIMULATED = 16
"""How many candidates are simulated."""
_ESTIMATED = 2.0
"""No estimate is longer than so many simulated steps: a step lasts as long as the way of the first microbatch, which is
the estimate's sum, and as long as the slowest stage works, its maximum."""
_RUNNERS_UP = 5


def find_plan(
    graph: Graph, costs: CostTable, cluster: Cluster, batch_size: int, config: RanncConfig | None = None
) -> Plan:
    """The fastest plan that trains `graph` with global batches of `batch_size` samples on `cluster`.

    It uses all devices, unless one that leaves some idle is faster or no other fits.

    Raises ValueError that names the option where options of `config` cannot be met, and PlanError where no plan fits
    into memory.
    """
    problem = Problem(graph, costs, cluster, batch_size, config or RanncConfig())
    check_options(problem)
    found = [_Found.on(problem)]
    work_us = least_work_us(problem)
    for part in parts(problem):
        best_us = min(f.step_us for f in found)
        if may_be_faster(part, work_us, best_us):
            found.append(_Found.on(part, best_us))
    # Of equally fast ones, that on most devices.
    fastest = min(found, key=lambda f: f.step_us)
    if not fastest.outcomes:
        raise explain_failure(problem)
    best = fastest.outcomes[0]
    others = _distinct([best, *sorted((o for f in found for o in f.outcomes), key=lambda o: o.simulation.step_us)])
    stages = _stage_plans(best, cluster)
    idle = tuple(sorted({*range(cluster.size)} - {rank for s in stages for rank in s.ranks}))
    return Plan(
        stages=stages,
        batch_size=batch_size,
        microbatches=best.candidate.microbatches,
        schedule=best.candidate.schedule,
        graph_hash=graph.structural_hash,
        step_time_us=best.simulation.step_us,
        why="; ".join(
            [explain_plan(best, sum(f.candidates for f in found), others)]
            + ([explain_idle(best, idle, found[0].outcomes)] if idle else [])
        ),
        runners_up=tuple(_runner_up(best, o) for o in others[:_RUNNERS_UP]),
        idle=idle,
    )


@dataclass(frozen=True)
class _Found:
    """The best plans on all devices of a problem, the fastest first."""

    outcomes: list[Outcome]
    candidates: int

    @property
    def step_us(self) -> float:
        return self.outcomes[0].simulation.step_us if self.outcomes else float("inf")

    @classmethod
    def on(cls, problem: Problem, best_us: float = float("inf")) -> _Found:
        """Plans that take longer than `best_us` do not matter."""
        models: dict[int, StageModel] = {}
        candidates = search(problem, models, best_us * _ESTIMATED)
        outcomes = rank(models, candidates[:_SIMULATED])
        if not problem.graph.split and wants_interleaved(problem.config):
            best_us = min(best_us, outcomes[0].simulation.step_us if outcomes else best_us)
            outcomes = fastest_first([*outcomes, *interleaved(problem, models, best_us)])
        return cls(outcomes, max(len(candidates), len(outcomes)))


def _distinct(outcomes: list[Outcome]) -> list[Outcome]:
    """The best of each other shape: plans that differ from the first one in more than where a stage ends."""
    by_shape: dict[tuple[object, ...], Outcome] = {}
    for o in outcomes:
        by_shape.setdefault((o.candidate.replicas, o.candidate.placement, o.candidate.microbatches), o)
    return list(by_shape.values())[1:]


def _stage_plans(outcome: Outcome, cluster: Cluster) -> tuple[StagePlan, ...]:
    """Stages on the ranks of `cluster`, of which the outcome may use a part."""
    c, model = outcome.candidate, outcome.model
    memory = peaks(model, c.schedule, c.stages, c.choices, len(set(outcome.ranks)))
    placed = [tuple(cluster.rank_of(model.problem.cluster, rank) for rank in own) for own in outcome.ranks]
    return tuple(
        StagePlan(stage.first, stage.last, ranks, *choice, times.forward, times.backward, peak, times.again)
        for stage, choice, ranks, times, peak in zip(c.stages, c.choices, placed, outcome.times, memory)
    )


def _runner_up(best: Outcome, other: Outcome) -> RunnerUp:
    c = other.candidate
    return RunnerUp(
        blocks=tuple(s.last - s.first + 1 for s in c.stages),
        replicas=tuple(s.replicas for s in c.stages),
        microbatches=c.microbatches,
        schedule=c.schedule,
        recompute=c.recompute,
        step_time_us=other.simulation.step_us,
        reason=why_slower(best, other),
        shard=c.shards,
        placement=c.placement,
    )
