"""`find_plan`: the fastest plan for a graph on a cluster.

For each number of microbatches, exact dynamic programming over stages and replicas (`dp.py`) on estimated times; the
best candidates of all, and a few interleaved ones, are then simulated event by event, and the best simulated one wins.
"""

from __future__ import annotations

from rannc_hf.capture.graph import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.cost.table import CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.explain import explain_failure, explain_plan, why_slower
from rannc_hf.partition.interleave import interleaved, wants_interleaved
from rannc_hf.partition.plan import Plan, RunnerUp, StagePlan
from rannc_hf.partition.problem import Problem
from rannc_hf.partition.rank import Outcome, fastest_first, peaks, rank
from rannc_hf.partition.space import PlanError, check_options, search
from rannc_hf.partition.stages import StageModel

__all__ = ["PlanError", "find_plan"]

_SIMULATED = 16
"""How many candidates are simulated."""
_RUNNERS_UP = 5


def find_plan(
    graph: Graph, costs: CostTable, cluster: Cluster, batch_size: int, config: RanncConfig | None = None
) -> Plan:
    """The fastest plan that trains `graph` with global batches of `batch_size` samples on all devices of `cluster`.

    Raises ValueError that names the option where options of `config` cannot be met, and PlanError where no plan fits
    into memory.
    """
    problem = Problem(graph, costs, cluster, batch_size, config or RanncConfig())
    check_options(problem)
    models: dict[int, StageModel] = {}
    candidates = search(problem, models)
    outcomes = rank(models, candidates[:_SIMULATED])
    if not graph.split and wants_interleaved(problem.config):
        best_us = outcomes[0].simulation.step_us if outcomes else float("inf")
        outcomes = fastest_first([*outcomes, *interleaved(problem, models, best_us)])
    if not outcomes:
        raise explain_failure(problem)
    best, others = outcomes[0], _distinct(outcomes)
    return Plan(
        stages=_stage_plans(models[best.candidate.microbatches], best),
        batch_size=batch_size,
        microbatches=best.candidate.microbatches,
        schedule=best.candidate.schedule,
        graph_hash=graph.structural_hash,
        step_time_us=best.simulation.step_us,
        why=explain_plan(best, max(len(candidates), len(outcomes)), others),
        runners_up=tuple(_runner_up(best, o) for o in others[:_RUNNERS_UP]),
    )


def _distinct(outcomes: list[Outcome]) -> list[Outcome]:
    """The best of each other shape: plans that differ from the best one in more than where a stage ends."""
    by_shape: dict[tuple[object, ...], Outcome] = {}
    for o in outcomes:
        by_shape.setdefault((o.candidate.replicas, o.candidate.placement, o.candidate.microbatches), o)
    return list(by_shape.values())[1:]


def _stage_plans(model: StageModel, outcome: Outcome) -> tuple[StagePlan, ...]:
    c = outcome.candidate
    memory = peaks(model, c.schedule, c.stages, c.choices, len(set(outcome.ranks)))
    return tuple(
        StagePlan(stage.first, stage.last, ranks, *choice, times.forward, times.backward, peak, times.again)
        for stage, choice, ranks, times, peak in zip(c.stages, c.choices, outcome.ranks, outcome.times, memory)
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
