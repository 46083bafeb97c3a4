"""What a report says of a plan: everything that is known from the plan, its graph and its cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rannc_hf.capture.graph import Graph
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.table import CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan, StagePlan
from rannc_hf.partition.segments import segments
from rannc_hf.partition.timeline import Timeline, timeline
from rannc_hf.report.trace import Span


@dataclass(frozen=True)
class BlockFacts:
    """A block; times are of one microbatch on one replica, None where they are not known."""

    index: int
    name: str
    parameters: int | None
    forward_us: float | None
    backward_us: float | None
    share: float
    """Of the time of its stage."""


@dataclass(frozen=True)
class Facts:
    """A plan with what follows from it."""

    plan: Plan
    graph: Graph | None
    cluster: Cluster | None
    blocks: tuple[tuple[BlockFacts, ...], ...]
    """Of each stage."""
    state_bytes: tuple[int, ...] | None
    """Parameters, gradients and optimizer of each stage; None without a graph."""
    timeline: Timeline | None
    """None where the plan predicts no times."""
    trace: tuple[Span, ...]

    @property
    def samples(self) -> int:
        """Of the largest microbatch."""
        return -(-self.plan.batch_size // self.plan.microbatches)

    @property
    def measured_us(self) -> float | None:
        """Time of the measured step."""
        return max(s.end_us for s in self.trace) if self.trace else None


def gather(plan: Plan, graph: Graph | None, cluster: Cluster | None, trace: Sequence[Span]) -> Facts:
    """Work out the facts. Raises ValueError where plan, graph and cluster do not belong together."""
    if graph is not None:
        plan.check(graph, plan.world_size)
    else:
        plan.check_shape(plan.stages[-1].last_block + 1 if plan.stages else 1, plan.world_size)
    if cluster is not None and cluster.size != plan.world_size:
        raise ValueError(f"the cluster has {cluster.size} devices, but the plan is for {plan.world_size} ranks")
    predicts = all(s.predicted_forward_us + s.predicted_backward_us > 0 for s in plan.stages)
    state = None
    if graph is not None:
        seg = segments(graph)
        state = tuple(seg.state_bytes(graph, s.shard, (s.first_block, s.last_block), s.replicas) for s in plan.stages)
    return Facts(
        plan,
        graph,
        cluster,
        _all_blocks(plan, graph, cluster),
        state,
        timeline(plan, graph, cluster) if predicts else None,
        tuple(trace),
    )


def _all_blocks(plan: Plan, graph: Graph | None, cluster: Cluster | None) -> tuple[tuple[BlockFacts, ...], ...]:
    if graph is None:
        ranges = [range(s.first_block, s.last_block + 1) for s in plan.stages]
        return tuple(tuple(BlockFacts(i, f"block {i}", None, None, None, 1 / len(r)) for i in r) for r in ranges)
    largest = -(-plan.batch_size // plan.microbatches)
    samples = [-(-largest // s.replicas) for s in plan.stages]
    tables = {} if cluster is None else {n: analytic_costs(graph, cluster.device, [n]) for n in set(samples)}
    return tuple(_blocks(s, graph, n, tables.get(n)) for s, n in zip(plan.stages, samples))


def _blocks(stage: StagePlan, graph: Graph, samples: int, costs: CostTable | None) -> tuple[BlockFacts, ...]:
    """The blocks of a stage; their times are in proportion to `costs` and add up to what the plan predicts."""
    blocks = graph.blocks[stage.first_block : stage.last_block + 1]
    parameters = [sum(graph.parameters[p].numel for p in b.parameters) for b in blocks]
    if costs is None:
        facts = zip(blocks, parameters)
        return tuple(BlockFacts(b.index, b.name, n, None, None, 1 / len(blocks)) for b, n in facts)
    again = 1 if stage.recompute == "blocks" else 0
    own = [costs.of(b, samples) for b in blocks]
    forward = _scaled([c.forward_us for c in own], stage.predicted_forward_us)
    backward = _scaled([c.backward_us + again * c.again_us for c in own], stage.predicted_backward_us)
    total = sum(forward) + sum(backward)
    return tuple(
        BlockFacts(b.index, b.name, n, f, r, (f + r) / total if total else 1 / len(blocks))
        for b, n, f, r in zip(blocks, parameters, forward, backward)
    )


def _scaled(values: Sequence[float], total: float) -> list[float]:
    found = sum(values)
    return [v * total / found for v in values] if found else list(values)
