"""`Problem`: what is planned, and which links the stages of a plan use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rannc_hf.capture.graph import Graph
from rannc_hf.capture.passes.batch_norm import slice_statistics
from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.cost.table import CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.collectives import Group, Half, consecutive_group, half
from rannc_hf.partition.segments import Segments, segments
from rannc_hf.partition.shards import SHARDS


class Stage(NamedTuple):
    """A stage of a candidate: blocks `first` to `last`, `replicas` ranks."""

    first: int
    last: int
    replicas: int


class Choice(NamedTuple):
    """How a stage runs: what it recomputes, and what its replicas divide."""

    recompute: str
    shard: str


class Way(NamedTuple):
    """Whether a stage's transfers in and out leave the node (None: the faster), and the collectives of its replicas."""

    into: bool | None
    out: bool | None
    half: Half


_ENOUGH_SAMPLES = 16
"""The error of batch normalisation grows below this number of samples (Wu and He, Group Normalization, 2018)."""


def memory_limit(cluster: Cluster, config: RanncConfig) -> float:
    """Bytes that a plan may use of each device."""
    if config.memory_limit_gib != "auto":
        return config.memory_limit_gib * GIB
    return cluster.usable_bytes


@dataclass(frozen=True)
class Problem:
    """A graph with its costs, on a cluster, for a global batch, within the user's options."""

    graph: Graph
    costs: CostTable
    cluster: Cluster
    batch_size: int
    config: RanncConfig
    segments: Segments = field(init=False)
    least_slice: int = field(init=False)
    """Samples that a replica gets of a microbatch at least: see `_least_slice`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", segments(self.graph))
        object.__setattr__(self, "least_slice", _least_slice(self))

    @property
    def memory_bytes(self) -> float:
        """What a plan may use of each device."""
        return memory_limit(self.cluster, self.config)

    @property
    def choices(self) -> list[Choice]:
        """What the options allow for stages with several replicas, and for those with one (which divide nothing)."""
        config = self.config
        recompute = ("none", "blocks") if config.recompute == "auto" else (config.recompute,)
        shards = SHARDS if config.shard == "auto" else tuple(dict.fromkeys(("none", config.shard)))
        return [Choice(r, s) for s in shards for r in recompute]

    def allows(self, shard: str, replicas: int) -> bool:
        """Whether a stage with so many replicas may divide `shard`."""
        if replicas == 1:
            return shard == "none"
        return self.config.shard in ("auto", shard)

    def way(self, placement: str, first: int, replicas: int) -> Way:
        """The links of a stage whose first rank is `first`; across nodes that does not matter.

        On consecutive ranks it depends on the place of `first` in its node only. Neighbours are taken to be near the
        boundaries of a stage; nothing enters the first stage and nothing leaves the last one.
        """
        cluster = self.cluster
        size = cluster.devices_per_node
        if placement == "across":
            group = Group(replicas, cluster.nodes, replicas / cluster.nodes / size)
            return Way(False, False, half(cluster, group))
        group = consecutive_group(cluster, first, replicas)
        spans = group.nodes > 1
        return Way(spans or first % size == 0, spans or (first + replicas) % size == 0, half(cluster, group))

    def best_way(self, replicas: int) -> Way:
        """Links at least as fast as those of any placement."""
        cluster = self.cluster
        nodes = range(-(-replicas // cluster.devices_per_node), min(replicas, cluster.nodes) + 1)
        halves = [half(cluster, Group(replicas, n, 1.0)) for n in nodes]
        return Way(None, None, Half(min(h.latency_us for h in halves), min(h.us_per_byte for h in halves)))


def _least_slice(problem: Problem) -> int:
    """1, but where batch normalisation takes its statistics over slices as many as a process has under data
    parallelism, or enough; where the user sets the number of microbatches, what that leaves."""
    statistics = slice_statistics(problem.graph.fx_graph.nodes)
    if not statistics:
        return 1
    least = min(problem.batch_size // problem.cluster.size, _ENOUGH_SAMPLES)
    if problem.config.microbatches != "auto":
        least = min(least, problem.batch_size // problem.config.microbatches)
        if problem.config.replicas != "auto":
            least = 1
    return max(least, 2 if min(statistics.values()) == 1 else 1)
