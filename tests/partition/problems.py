"""Random small planning problems."""

from __future__ import annotations

from dataclasses import replace

import torch
from graphs import make_costs, make_graph
from hypothesis import strategies as st

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import DEVICES, GIB, Link
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.problem import Problem


def cluster(nodes, per_node, memory_bytes=10 * GIB, overlaps=True):
    device = replace(
        DEVICES["CPU"], memory_bytes=memory_bytes, reserved_bytes=0, memory_bandwidth=1e9, overlaps=overlaps
    )
    return Cluster(nodes, per_node, device, Link("intra", 1e-6, 1e9), Link("inter", 5e-6, 1e8))


@st.composite
def problems(draw):
    n = draw(st.integers(2, 5))
    widths = draw(st.lists(st.integers(1, 40), min_size=n, max_size=n, unique=True))
    skips = draw(st.lists(st.tuples(st.integers(0, n - 3), st.integers(2, n - 1)), max_size=2)) if n > 2 else []
    skips = [(p, c) for p, c in set(skips) if c > p + 1]
    tied = [(0, n - 1)] if draw(st.booleans()) else []
    if tied:
        widths[-1] = widths[0]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    graph = make_graph(widths, skips=skips, tied=tied, dtype=dtype)
    times = draw(st.lists(st.floats(0.5, 50), min_size=n, max_size=n))
    again = draw(st.sampled_from([1.0, 0.7, 1.6]))
    costs = make_costs(graph, times, saved=draw(st.sampled_from([100, 2000])), again=again)
    nodes, per_node = draw(st.sampled_from([(1, 2), (1, 4), (2, 2), (1, 3), (2, 3), (3, 2)]))
    memory = draw(st.sampled_from([10 * GIB, 80_000, 60_000, 40_000, 30_000, 20_000]))
    batch = draw(st.sampled_from([4, 6, 8, 12]))
    kinds = ["auto", "auto", "none", "optimizer", "gradients", "parameters"]
    config = RanncConfig(
        recompute=draw(st.sampled_from(["auto", "auto", "none", "blocks"])), shard=draw(st.sampled_from(kinds))
    )
    return Problem(graph, costs, cluster(nodes, per_node, memory, draw(st.booleans())), batch, config)
