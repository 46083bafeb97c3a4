"""`timeline`: the step of a plan as the simulation predicts it, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rannc_hf.capture.graph import Graph
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.ends import Ends
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.problem import Choice, Stage
from rannc_hf.partition.rank import edges_of, stage_ends, tied_of
from rannc_hf.partition.segments import segments
from rannc_hf.partition.simulate import Edge, Event, Simulation, StageTimes, simulate


@dataclass(frozen=True)
class Timeline:
    """Events of one step, in microseconds from its start."""

    events: tuple[Event, ...]
    simulation: Simulation
    complete: bool
    """Whether transfers, gradient reduction and optimizer are in it; otherwise computes alone."""


def timeline(plan: Plan, graph: Graph | None = None, cluster: Cluster | None = None) -> Timeline:
    """Simulate a step from the forward and backward times that `plan` predicts.

    With the plan's graph and its cluster the result lasts as long as the planner predicted. Without either it has
    computes alone: messages and the end of the step take no time, and each stage waits for its neighbours only.
    """
    events: list[Event] = []
    groups = len(plan.groups)
    computes = [(s.predicted_forward_us, s.predicted_backward_us) for s in plan.stages]
    if graph is None or cluster is None:
        edges = [Edge(s, s + 1, 0.0, 0.0) for s in range(len(plan.stages) - 1)]
        times = [StageTimes(*pair) for pair in computes]
        simulation = simulate(times, edges, plan.schedule, plan.microbatches, events=events, groups=groups)
        kept = tuple(e for e in events if e.kind in ("forward", "backward"))
        return Timeline(kept, simulation, complete=False)
    seg = segments(graph)
    stages = [Stage(s.first_block, s.last_block, s.replicas) for s in plan.stages]
    cluster, place = cluster.used_by({rank for s in plan.stages for rank in s.ranks})
    ranks = [tuple(place[rank] for rank in s.ranks) for s in plan.stages]
    ends = [
        stage_ends(
            graph,
            seg,
            cluster,
            stage,
            Choice(s.recompute, s.shard),
            own,
            s.predicted_backward_us - s.predicted_again_us,
        )
        for stage, s, own in zip(stages, plan.stages, ranks)
    ]
    times = [StageTimes(*pair, float(e.head), float(e.exposed), float(e.optimizer)) for pair, e in zip(computes, ends)]
    samples = -(-plan.batch_size // plan.microbatches)
    edges = edges_of(seg.crossings, cluster, stages, ranks, samples)
    tied = tied_of(seg, cluster, stages, ranks)
    simulation = simulate(times, edges, plan.schedule, plan.microbatches, tied, events, groups)
    return Timeline((*events, *_reductions(ends, events)), simulation, complete=True)


def _reductions(ends: Sequence[Ends], events: Sequence[Event]) -> list[Event]:
    """The gradient reduction of each stage, which begins within its last backward."""
    found = []
    for index, end in enumerate(ends):
        done = max(e.end_us for e in events if e.stage == index and e.kind == "backward")
        reduced = done + float(end.exposed)
        if end.reduce > 0:
            found.append(Event("reduce_grad", index, None, reduced - float(end.reduce), reduced))
    return found
