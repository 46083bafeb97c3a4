"""Time of collectives over the replicas of a stage, in one node or over several.

A group that spans nodes with several ranks in each reduces in three steps: reduce-scatter inside each node, all-reduce
between nodes of what each rank then holds, all-gather inside (M. Cho et al., "BlueConnect: Decomposing all-reduce for
deep learning on heterogeneous network hierarchy", MLSys 2019). Each step is a ring (P. Patarasuk and X. Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009). A reduce-scatter or an all-gather
over the whole group is half of that, and so are sums to owners and copies from owners, in the same volume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rannc_hf.partition.cluster import Cluster


class Group(NamedTuple):
    """Ranks that reduce together: how many, on how many nodes, and the share of a node's outer link they may use."""

    ranks: int
    nodes: int
    share: float


class Half(NamedTuple):
    """A reduce-scatter or an all-gather of `size` bytes takes `latency_us + size * us_per_byte`."""

    latency_us: float
    us_per_byte: float

    def time_us(self, size: float) -> float:
        """Microseconds for a buffer of `size` bytes; nothing takes no time."""
        return self.latency_us + size * self.us_per_byte if size else 0.0


def group_of(cluster: Cluster, ranks: Sequence[int]) -> Group:
    """The group that `ranks` form.

    Of consecutive ranks, at most two groups meet in a node and leave it, so one that does not fill its nodes has half
    of their links. Otherwise all devices of a node are taken to have an equal share of its link.
    """
    low, high = min(ranks), max(ranks)
    if high - low + 1 == len(ranks):
        return consecutive_group(cluster, low, len(ranks))
    counts = Counter(cluster.node(r) for r in ranks)
    share = min(counts.values()) / cluster.devices_per_node if len(counts) > 1 else 1.0
    return Group(len(ranks), len(counts), share)


def consecutive_group(cluster: Cluster, first: int, count: int) -> Group:
    """The group of ranks `first` to `first + count - 1`."""
    nodes = cluster.node(first + count - 1) - cluster.node(first) + 1
    fills = first % cluster.devices_per_node == 0 and count % cluster.devices_per_node == 0
    return Group(count, nodes, 1.0 if nodes == 1 or fills else 0.5)


def half(cluster: Cluster, group: Group) -> Half:
    """Cost of a reduce-scatter, or of an all-gather, over `group`."""
    inner = -(-group.ranks // group.nodes)
    intra, inter = cluster.intra, cluster.inter
    latency = (inner - 1) * intra.latency_s + (group.nodes - 1) * inter.latency_s
    rate = (inner - 1) / inner / intra.bandwidth + (group.nodes - 1) / group.nodes / (group.share * inter.bandwidth)
    return Half(latency * 1e6, rate * 1e6)


def all_reduce_us(cluster: Cluster, group: Group, size: float) -> float:
    """Microseconds to sum `size` bytes over all ranks of `group`."""
    return 2 * half(cluster, group).time_us(size)
