"""Sharding over the replicas of a stage: which replica owns which parameter.

A parameter is owned whole, so optimizers that need whole tensors work, and states keep their names and shapes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from rannc_hf.capture.graph import Graph

SHARDS = ("none", "optimizer", "gradients", "parameters")
"""What the replicas of a stage divide among them; each includes those before it.

- none: every replica holds everything (DistributedDataParallel).
- optimizer: masters and moments (ZeRO-1). Gradients are added up to the owner in the last backward, and the owner sends
  its parameters to the others at the beginning of a step.
- gradients: sums of gradients too (ZeRO-2). The gradients of each microbatch are added up to the owner.
- parameters: copies to compute with too (ZeRO-3, fully sharded). A block's are gathered before its forward and again
  before its backward, and freed after each.

S. Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020.
"""


def shardable(graph: Graph, first_block: int, last_block: int) -> dict[str, int]:
    """Elements of the parameters that a stage of these blocks divides, by name in the graph's order.

    These are the trained ones that no block outside the stage uses: what is tied across stages stays whole everywhere.
    """
    inside: dict[str, bool] = {}
    for block in graph.blocks:
        within = first_block <= block.index <= last_block
        for name in block.parameters:
            inside[name] = inside.get(name, True) and within
    live = graph.gradient_parameters()
    return {name: spec.numel for name, spec in graph.parameters.items() if inside.get(name) and name in live}


def owners(sizes: Mapping[str, int], replicas: int) -> dict[str, int]:
    """The replica that owns each parameter, from their elements: the largest first, each to the least loaded.

    No replica gets more than an even share and one parameter (R. L. Graham, "Bounds on multiprocessing timing
    anomalies", SIAM J. Appl. Math. 1969). The same for equal arguments, on every rank.
    """
    heap = [(0, replica) for replica in range(replicas)]
    result: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        load, replica = heapq.heappop(heap)
        result[name] = replica
        heapq.heappush(heap, (load + sizes[name], replica))
    return result
