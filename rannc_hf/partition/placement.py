"""Which ranks the stages of a plan run on."""

from __future__ import annotations

from collections.abc import Sequence

from rannc_hf.partition.cluster import Cluster

PLACEMENTS = ("consecutive", "across")
"""consecutive: the ranks of a stage follow each other, so its replicas are near each other and stages may be on other
nodes. across: each stage has equally many ranks on every node, so activations stay within nodes and gradients go
between them."""


def stage_ranks(cluster: Cluster, placement: str, replicas: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranks of each stage, in the order of its replicas."""
    ranks = []
    first = 0
    for count in replicas:
        if placement == "consecutive":
            ranks.append(tuple(range(first, first + count)))
            first += count
        else:
            each, nodes = count // cluster.nodes, range(cluster.nodes)
            ranks.append(tuple(n * cluster.devices_per_node + first + k for n in nodes for k in range(each)))
            first += each
    return ranks


def across_replicas(cluster: Cluster, batch_size: int, microbatches: int, replicas: Sequence[int]) -> list[int]:
    """Those of `replicas` that a stage may have across nodes.

    They are multiples of the number of nodes, and divide the samples of each microbatch evenly: then the samples that
    a node holds are the same in all stages, and no activation leaves it.
    """
    if cluster.nodes == 1 or batch_size % microbatches:
        return []
    samples = batch_size // microbatches
    return [r for r in replicas if r % cluster.nodes == 0 and samples % r == 0]
