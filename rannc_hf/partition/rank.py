"""Simulating candidates, and ordering them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rannc_hf.capture.graph import Graph
from rannc_hf.cost.devices import Link
from rannc_hf.partition.candidate import Candidate
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.collectives import all_reduce_us, group_of, half
from rannc_hf.partition.ends import Ends, ends_of, work_of
from rannc_hf.partition.memory import owned_load
from rannc_hf.partition.placement import stage_ranks
from rannc_hf.partition.problem import Choice, Stage
from rannc_hf.partition.schedules import compute_order
from rannc_hf.partition.segments import Crossing, Segments
from rannc_hf.partition.simulate import Edge, Simulation, StageTimes, TiedReduce, simulate
from rannc_hf.partition.stages import StageModel

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """A candidate, simulated."""

    model: StageModel
    candidate: Candidate
    ranks: tuple[Ranks, ...]
    times: tuple[StageTimes, ...]
    simulation: Simulation


def rank(models: Mapping[int, StageModel], candidates: Sequence[Candidate]) -> list[Outcome]:
    """Simulate candidates; the fastest first."""
    return fastest_first([_simulate(models[c.microbatches], c) for c in candidates])


def fastest_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Sorted by time. 1F1B needs the least memory and transfers: others must be faster by more than rounding."""
    return sorted(outcomes, key=lambda o: o.simulation.step_us * (1.0 if o.candidate.schedule == "1f1b" else 1.001))


def _simulate(model: StageModel, c: Candidate) -> Outcome:
    ranks = tuple(stage_ranks(model.problem.cluster, c.placement, c.replicas))
    return Outcome(model, c, ranks, *simulate_on(model, c.schedule, c.stages, c.choices, ranks))


def simulate_on(
    model: StageModel, schedule: str, stages: Sequence[Stage], choices: Sequence[Choice], ranks: Sequence[Ranks]
) -> tuple[tuple[StageTimes, ...], Simulation]:
    """Times of each stage on its ranks, wherever those are, and the step they make."""
    problem = model.problem
    cluster, seg = problem.cluster, problem.segments
    times = []
    for stage, choice, own in zip(stages, choices, ranks):
        forward, backward = model.times(stage, half(cluster, group_of(cluster, own)), choice)
        again = model.again_us(stage, choice)
        ends = stage_ends(problem.graph, seg, cluster, stage, choice, own, backward - again)
        head, exposed, optimizer = (float(each) for each in (ends.head, ends.exposed, ends.optimizer))
        times.append(StageTimes(forward, backward, head, exposed, optimizer, again))
    edges = edges_of(seg.crossings, cluster, stages, ranks, model.samples)
    tied = tied_of(seg, cluster, stages, ranks)
    return tuple(times), simulate(times, edges, schedule, model.microbatches, tied, groups=len(set(ranks)))


def peaks(
    model: StageModel, schedule: str, stages: Sequence[Stage], choices: Sequence[Choice], groups: int | None = None
) -> list[int]:
    """Peak bytes on a rank of each stage; `groups` of the ranks run the stages, by default one each."""
    count = len(stages)
    groups = groups or count
    parts = [model.memory_parts(stage, choice) for stage, choice in zip(stages, choices)]
    found = []
    for group in range(groups):
        held, most = dict.fromkeys(range(group, count, groups), 0), 0.0
        for backward, s, _ in compute_order(schedule, group, count, model.microbatches, groups):
            held[s] += not backward
            most = max(most, sum(n * parts[own].kept for own, n in held.items()) + parts[s].extra)
            held[s] -= backward
        found.append(math.ceil(sum(parts[s].state for s in held) + most))
    return [found[s % groups] for s in range(count)]


def stage_ends(
    graph: Graph,
    seg: Segments,
    cluster: Cluster,
    stage: Stage,
    choice: Choice,
    ranks: Ranks,
    backward_us: float,
) -> Ends:
    """What a stage on `ranks` does before its first forward and after its last backward.

    `backward_us` is that of a microbatch, without recomputation.
    """
    blocks = stage.first, stage.last
    load = owned_load(graph, seg.sizes, choice.shard, blocks, stage.replicas)
    work = work_of(seg.holdings, blocks, choice.shard, stage.replicas, backward_us, load.elements)
    return ends_of(cluster.device, choice.shard, half(cluster, group_of(cluster, ranks)), work)


def tied_of(seg: Segments, cluster: Cluster, stages: Sequence[Stage], ranks: Sequence[Ranks]) -> list[TiedReduce]:
    """The reductions of weights tied across stages, one for each set of stages."""
    stage_of = [s for s, stage in enumerate(stages) for _ in range(stage.first, stage.last + 1)]
    sizes: dict[tuple[int, ...], list[float]] = {}
    for parameter in seg.tied:
        holders = tuple(sorted({stage_of[b] for b in parameter.users}))
        if len(holders) > 1:
            sizes.setdefault(holders, []).append(parameter.gradient_bytes)
    found = []
    for holders, each in sizes.items():
        group = group_of(cluster, sorted(set(itertools.chain.from_iterable(ranks[s] for s in holders))))
        found.append(TiedReduce(holders, sum(all_reduce_us(cluster, group, size) for size in each)))
    return found


def edges_of(
    crossings: Sequence[Crossing], cluster: Cluster, stages: Sequence[Stage], ranks: Sequence[Ranks], samples: int
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
        # What a rank hands to another stage of its own takes no time.
        near = ranks[source] == ranks[destination]
        shares = [] if near else _shares(cluster, ranks[source], ranks[destination])
        times = [
            max((link.time_us(size * share) for link, share in shares), default=0.0) if size else None
            for size in (forward, backward)
        ]
        edges.append(Edge(source, destination, times[0] or 0.0, times[1]))
    return edges


def _shares(cluster: Cluster, sources: Ranks, destinations: Ranks) -> list[tuple[Link, float]]:
    """For each kind of link, the largest part of a boundary's values that goes over one of them in one direction.

    Within a node each pair of devices has its own link; between nodes all devices of a node share its link.
    """
    near: dict[tuple[str, int], float] = {}
    far: dict[tuple[str, int], float] = {}
    for source, destination, part in _overlaps(len(sources), len(destinations)):
        a, b = sources[source], destinations[destination]
        within = cluster.node(a) == cluster.node(b)
        loads = near if within else far
        for key in (("out", a if within else cluster.node(a)), ("in", b if within else cluster.node(b))):
            loads[key] = loads.get(key, 0.0) + part
    pairs = ((cluster.intra, near), (cluster.inter, far))
    return [(link, max(loads.values())) for link, loads in pairs if loads]


def _overlaps(sources: int, destinations: int) -> Iterator[tuple[int, int, float]]:
    """(source, destination, part of the samples) for contiguous slices of equal size."""
    source = destination = 0
    while source < sources and destination < destinations:
        start = max(source / sources, destination / destinations)
        ends = (source + 1) * destinations, (destination + 1) * sources
        yield source, destination, min(ends) / (sources * destinations) - start
        source, destination = source + (ends[0] <= ends[1]), destination + (ends[1] <= ends[0])
