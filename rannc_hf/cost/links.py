"""What the links between the ranks of torch.distributed reach, inside a node and between nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rannc_hf.cost.machine import synchronize

_SMALL = 1024
_TRIPS = 20
_ROUNDS = 3
"""The fastest counts: others may have been disturbed."""


@dataclass(frozen=True)
class Reached:
    """A measured link. Bandwidths in bytes per second."""

    latency_s: float
    """Of a small message, one way."""
    bandwidth: float
    """One way, of a large message; between nodes that of all pairs of ranks together."""
    reduce_bandwidth: float
    """What a link must carry each way for a large all-reduce in a ring to take as long as it did."""

    def figures(self, name: str) -> dict[str, str | float]:
        """Fields of `Link`. The planner has one bandwidth for messages and sums: the lower one."""
        return {"name": name, "latency_s": self.latency_s, "bandwidth": min(self.bandwidth, self.reduce_bandwidth)}


def probe_links(where: torch.device, ranks_per_node: int) -> tuple[Reached | None, Reached | None]:
    """Links inside the first node and between the first two, the same on every rank; None where there is none.

    Collective over all ranks; rank r is on node ``r // ranks_per_node``. Tensors are on `where`, for which
    torch.distributed must have a backend.
    """
    world = dist.get_world_size()
    node = range(min(ranks_per_node, world))
    intra = inter = None
    if len(node) > 1:
        intra = _probe([(0, 1)], node, where)
    if world > ranks_per_node:
        inter = _probe([(r, r + ranks_per_node) for r in node], range(0, world, ranks_per_node), where)
    return intra, inter


def _probe(pairs: Sequence[tuple[int, int]], reducing: Sequence[int], where: torch.device) -> Reached:
    """Messages between all `pairs` at once, and an all-reduce over `reducing`."""
    # Groups are made by all ranks, in the same order.
    groups = [dist.new_group(list(pair)) for pair in pairs]
    ring = dist.new_group(list(reducing))
    size = 2**28 if where.type == "cuda" else 2**24
    mine = next((i for i, pair in enumerate(pairs) if dist.get_rank() in pair), None)

    def trip(count: int) -> Callable[[], None]:
        data = torch.zeros(count, dtype=torch.uint8, device=where)
        return lambda: _there_and_back(data, pairs[mine], groups[mine]) if mine is not None else None

    latency = _slowest(trip(_SMALL), _TRIPS, where) / 2
    large = _slowest(trip(size), 3, where) / 2
    bandwidth = len(pairs) * size / max(large - latency, large / 10)
    numbers = torch.zeros(size // 4, device=where)
    member = dist.get_rank() in reducing
    reduced = _slowest(lambda: dist.all_reduce(numbers, group=ring) if member else None, 3, where)
    hops = 2 * (len(reducing) - 1)
    carried = hops / len(reducing) * size
    return Reached(latency, bandwidth, carried / max(reduced - hops * latency, reduced / 10))


def _there_and_back(data: torch.Tensor, pair: tuple[int, int], group: dist.ProcessGroup) -> None:
    first, second = pair
    if dist.get_rank() == first:
        dist.send(data, second, group=group)
        dist.recv(data, second, group=group)
    else:
        dist.recv(data, first, group=group)
        dist.send(data, first, group=group)


def _slowest(run: Callable[[], object], repeats: int, where: torch.device) -> float:
    """Seconds of one `run` on the slowest rank; ranks that have nothing to do wait."""
    # The first one connects.
    run()
    rounds = []
    for _ in range(_ROUNDS):
        _wait(where)
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(where)
        rounds.append((time.perf_counter() - started) / repeats)
    spent = torch.tensor(rounds, dtype=torch.float64, device=where)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent.min().item())


def _wait(where: torch.device) -> None:
    """Until all ranks are here."""
    token = torch.zeros(1, device=where)
    dist.all_reduce(token)
    # A number read on the host, so that the device is done too.
    token.item()
