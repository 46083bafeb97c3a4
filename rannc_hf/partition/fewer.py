"""Plans that leave devices idle, so that more devices never make a plan slower.

A reduction over more ranks takes longer, a link between nodes may be slow, and a batch may have too few samples for all
replicas. So the planner also looks at parts of the cluster: some devices of each of some nodes, a cluster of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rannc_hf.partition.problem import Problem
from rannc_hf.partition.schedules import INTERLEAVED
from rannc_hf.partition.space import microbatch_counts

_QUICK = 2000
"""Devices times blocks up to which a search takes a second or less, so that many can be made."""


def parts(problem: Problem) -> Iterator[Problem]:
    """The same problem on fewer devices, most devices first.

    All parts where a search is quick; else those with all or a power of two of the nodes, and of the devices of each.
    """
    cluster, config = problem.cluster, problem.config
    if config.replicas != "auto":
        return
    least = 2 if config.schedule == INTERLEAVED else 1
    least = max(least, config.stages) if config.stages != "auto" else least
    quick = cluster.size * len(problem.graph.blocks) <= _QUICK
    pairs = [(n, d) for n in range(1, cluster.nodes + 1) for d in range(1, cluster.devices_per_node + 1)]
    for nodes, devices in sorted(pairs, key=lambda pair: (-pair[0] * pair[1], pair)):
        regular = _whole_or_power(nodes, cluster.nodes) and _whole_or_power(devices, cluster.devices_per_node)
        if least <= nodes * devices < cluster.size and (regular or quick):
            yield replace(problem, cluster=cluster.part(nodes, devices))


def _whole_or_power(number: int, whole: int) -> bool:
    return number == whole or number & (number - 1) == 0


def least_work_us(problem: Problem) -> float:
    """Device time of a step, in microseconds: no plan takes less than that over the number of its devices."""
    least = []
    for microbatches in microbatch_counts(problem):
        samples = -(-problem.batch_size // microbatches)
        # Replicas to the samples of the largest share; of equal shares, fewer replicas work less.
        shares = {-(-samples // r): r for r in range(samples, 0, -1)}
        known: dict[str, float] = {}
        for block in problem.graph.blocks:
            if block.key not in known:
                costs = [(r, problem.costs.of(block, share)) for share, r in shares.items()]
                known[block.key] = min(r * (c.forward_us + c.backward_us) for r, c in costs)
        least.append(microbatches * sum(known[b.key] for b in problem.graph.blocks))
    return min(least)


def may_be_faster(part: Problem, work_us: float, step_us: float) -> bool:
    """Whether a plan on `part` may take less than `step_us`, by its `work_us` and the memory that it needs."""
    size = part.cluster.size
    return work_us < size * step_us and part.segments.whole_bytes <= size * part.memory_bytes
