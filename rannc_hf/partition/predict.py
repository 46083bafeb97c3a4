"""`predict`: step time and memory of a plan, whoever wrote it."""

from __future__ import annotations

from dataclasses import replace

from rannc_hf.capture.graph import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.cost.table import CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan, short_ranks
from rannc_hf.partition.problem import Choice, Problem, Stage
from rannc_hf.partition.rank import peaks, simulate_on
from rannc_hf.partition.space import PlanError
from rannc_hf.partition.stages import StageModel


def predict(plan: Plan, graph: Graph, costs: CostTable, cluster: Cluster) -> Plan:
    """`plan` with the times and the memory that the search would predict for it.

    Its ranks may be placed in any way. A plan that needs more memory than there is gets its predictions too; see
    `check_memory`.

    Raises ValueError, naming the field, for a plan that cannot train `graph` on `cluster`.
    """
    plan.check(graph, cluster.size)
    part, place = cluster.used_by({rank for s in plan.stages for rank in s.ranks})
    problem = Problem(graph, costs, part, plan.batch_size, RanncConfig())
    model = StageModel(problem, plan.microbatches, sorted({s.replicas for s in plan.stages}))
    stages = [Stage(s.first_block, s.last_block, s.replicas) for s in plan.stages]
    # One replica divides nothing, whatever its plan says.
    choices = [Choice(s.recompute, s.shard if s.replicas > 1 else "none") for s in plan.stages]
    ranks = [tuple(place[rank] for rank in s.ranks) for s in plan.stages]
    times, simulation = simulate_on(model, plan.schedule, stages, choices, ranks)
    predicted = tuple(
        replace(
            stage,
            predicted_forward_us=t.forward,
            predicted_backward_us=t.backward,
            predicted_again_us=t.again,
            predicted_memory_bytes=peak,
        )
        for stage, t, peak in zip(plan.stages, times, peaks(model, plan.schedule, stages, choices, len(plan.groups)))
    )
    return replace(plan, stages=predicted, step_time_us=simulation.step_us)


def check_memory(plan: Plan, limit_bytes: float) -> None:
    """Raise PlanError, naming the stages, where a predicted plan needs more than `limit_bytes` of a device."""
    large = [
        f"  stages[{index}] needs {stage.predicted_memory_bytes / GIB:.4g} GiB on each of its ranks "
        f"({short_ranks(stage.ranks)})"
        for index, stage in enumerate(plan.stages)
        if stage.predicted_memory_bytes > limit_bytes
    ]
    if large:
        raise PlanError(
            "\n".join([f"the plan does not fit: it may use {limit_bytes / GIB:.4g} GiB of each device, but", *large])
        )
