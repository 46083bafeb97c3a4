"""`timeline`: the step of a plan as the simulation predicts it, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rannc_hf.capture.graph import Graph
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan, StagePlan
from rannc_hf.partition.rank import edges_of
from rannc_hf.partition.segments import Segments, segments
from rannc_hf.partition.simulate import Edge, Event, Simulation, StageTimes, simulate
from rannc_hf.partition.stages import Stage, Tail, TailWork, tail_of


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
    if graph is None or cluster is None:
        tails: list[Tail] = []
        edges = [Edge(s, s + 1, 0.0, 0.0) for s in range(len(plan.stages) - 1)]
    else:
        seg = segments(graph)
        stages = [Stage(s.first_block, s.last_block, s.replicas) for s in plan.stages]
        samples = -(-plan.batch_size // plan.microbatches)
        tails = [_tail(s, seg, cluster) for s in plan.stages]
        edges = edges_of(seg.crossings, cluster, stages, [s.ranks for s in plan.stages], samples)
    ends = [float(t.total) for t in tails] or [0.0] * len(plan.stages)
    times = [StageTimes(s.predicted_forward_us, s.predicted_backward_us, t) for s, t in zip(plan.stages, ends)]
    simulation = simulate(times, edges, plan.schedule, plan.microbatches, events)
    if not tails:
        return Timeline(tuple(e for e in events if e.peer is None), simulation, complete=False)
    return Timeline((*events, *_end_events(tails, events)), simulation, complete=True)


def _tail(stage: StagePlan, seg: Segments, cluster: Cluster) -> Tail:
    again = stage.predicted_forward_us if stage.recompute == "blocks" else 0.0
    at = stage.first_block, stage.last_block
    numbers = (
        stage.predicted_backward_us - again,
        stage.last_block - stage.first_block + 1,
        seg.gradient_bytes[at],
        seg.trained[at],
        seg.tensors[at],
    )
    between_nodes = cluster.node(min(stage.ranks)) != cluster.node(max(stage.ranks))
    work = TailWork(*(np.asarray(n, dtype=np.float64) for n in numbers))
    return tail_of(cluster, between_nodes, np.asarray(float(stage.replicas)), work)


def _end_events(tails: Sequence[Tail], events: Sequence[Event]) -> list[Event]:
    """The gradient reduction of each stage, which begins within its last backward, and its optimizer step."""
    found = []
    for index, tail in enumerate(tails):
        done = max(e.end_us for e in events if e.stage == index and e.kind == "backward")
        reduced = done + float(tail.exposed)
        if tail.reduce > 0:
            found.append(Event("reduce_grad", index, None, reduced - float(tail.reduce), reduced))
        found.append(Event("optimizer", index, None, reduced, reduced + float(tail.optimizer)))
    return found
