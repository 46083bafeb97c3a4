"""Simulating candidates under the schedules that fit, and ordering them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.dp import Candidate
from rannc_hf.partition.segments import Crossing
from rannc_hf.partition.simulate import Edge, Simulation, StageTimes, simulate
from rannc_hf.partition.stages import Stage, StageModel


@dataclass(frozen=True)
class Outcome:
    """A candidate, simulated."""

    candidate: Candidate
    simulation: Simulation


def rank(models: dict[int, StageModel], candidates: Sequence[Candidate]) -> list[Outcome]:
    """Simulate candidates; the fastest first."""
    outcomes = [Outcome(c, _simulate(models[c.microbatches], c)) for c in candidates]
    # 1F1B holds fewer microbatches: it wins unless GPipe is faster by more than rounding.
    return sorted(outcomes, key=lambda o: o.simulation.step_us * (1.0 if o.candidate.schedule == "1f1b" else 1.001))


def _simulate(model: StageModel, c: Candidate) -> Simulation:
    ranks = list(stage_ranks(c.stages))
    times = []
    for stage, recompute, own in zip(c.stages, c.recompute, ranks):
        forward, backward = model.times(stage, recompute)
        ways = model.problem.ways(own[0], stage.replicas)
        times.append(StageTimes(forward, backward, model.tail_us(stage, ways)))
    crossings, cluster = model.problem.segments.crossings, model.problem.cluster
    return simulate(times, edges_of(crossings, cluster, c.stages, ranks, model.samples), c.schedule, c.microbatches)


def stage_ranks(stages: Sequence[Stage]) -> Iterator[tuple[int, ...]]:
    first = 0
    for stage in stages:
        yield tuple(range(first, first + stage.replicas))
        first += stage.replicas


def edges_of(
    crossings: Sequence[Crossing],
    cluster: Cluster,
    stages: Sequence[Stage],
    ranks: Sequence[tuple[int, ...]],
    samples: int,
) -> list[Edge]:
    """One edge for each pair of stages that values go between, skipping stages or not; `samples` of a microbatch."""
    stage_of = [s for s, stage in enumerate(stages) for _ in range(stage.first, stage.last + 1)]
    sizes: dict[tuple[int, int], list[float]] = {}
    for value in crossings:
        source = stage_of[value.producer]
        for destination in {stage_of[c] for c in value.consumers} - {source}:
            amount = sizes.setdefault((source, destination), [0.0, 0.0])
            amount[0] += value.constant + value.per_sample * samples
            amount[1] += (value.constant + value.per_sample * samples) * value.needs_grad
    edges = []
    for (source, destination), (forward, backward) in sorted(sizes.items()):
        both = (*ranks[source], *ranks[destination])
        link = cluster.link(min(both), max(both))
        # Within a node each pair of devices has its own link; between nodes all share the node's.
        share = 1 if link is cluster.inter else min(len(ranks[source]), len(ranks[destination]))
        back = link.time_us(backward / share) if backward else None
        edges.append(Edge(source, destination, link.time_us(forward / share), back))
    return edges
