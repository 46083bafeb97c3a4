"""Memory for later batches, which may need more than the first one.

Times in a plan are those of batches like the first: without attention masks where it has no padding, the head on as
many rows as have a label. Memory must suffice for all: with masks, and for the most labels that such samples have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from rannc_hf.capture.graph import Graph
from rannc_hf.cost.memory import block_memory
from rannc_hf.cost.table import BlockCost, CostTable

_DEVIATIONS = 4
"""So many standard deviations above the mean, no slice of a batch is expected to have more labels."""


def most_labelled(labels: Sequence[int], rows: int) -> float:
    """The largest share of `rows` that a slice of samples is expected to have a label in.

    `labels` are those of each sample of a batch. A slice of one sample varies most. Samples that are all alike are
    taken to have labels at random, so that others may have more, unless all rows have one.
    """
    mean = sum(labels) / len(labels)
    spread = math.sqrt(sum((n - mean) ** 2 for n in labels) / len(labels))
    at_random = math.sqrt(mean * (1 - mean / rows))
    return min(1.0, max(max(labels), mean + _DEVIATIONS * max(spread, at_random)) / rows)


def with_room(costs: CostTable, usual: Graph, largest: Graph) -> CostTable:
    """Costs of the blocks of `largest`, a variant of `usual`: times as in `costs`, and the memory that both need.

    What `largest` needs more follows from its operations, so that nothing is measured, or compiled, for it.
    """
    points: dict[str, tuple[BlockCost, ...]] = {}
    for index, (ours, theirs) in enumerate(zip(usual.blocks, largest.blocks, strict=True)):
        if theirs.key not in points:
            known = costs.points[ours.key]
            same = ours.key == theirs.key
            points[theirs.key] = known if same else tuple(_more(p, usual, largest, index, costs) for p in known)
    names = {b.key: b.name for b in reversed(largest.blocks)}
    return replace(costs, points=points, names=names)


def _more(point: BlockCost, usual: Graph, largest: Graph, index: int, costs: CostTable) -> BlockCost:
    ours, theirs = (
        block_memory(graph, graph.blocks[index], point.samples, cpu=costs.device.is_cpu) for graph in (usual, largest)
    )
    return replace(
        point,
        saved_bytes=point.saved_bytes + max(0, theirs.saved - ours.saved),
        output_bytes=point.output_bytes + max(0, theirs.output - ours.output),
        workspace_bytes=point.workspace_bytes + max(0, theirs.workspace - ours.workspace),
    )
