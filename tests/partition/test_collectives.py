"""Collectives and placements: worked out by hand."""

from __future__ import annotations

import pytest
from graphs import make_costs, make_graph

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import Link
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.collectives import Group, all_reduce_us, consecutive_group, group_of, half
from rannc_hf.partition.placement import across_replicas, stage_ranks
from rannc_hf.partition.problem import Stage
from rannc_hf.partition.rank import edges_of
from rannc_hf.partition.search import find_plan
from rannc_hf.partition.segments import Crossing

C = Cluster.parse("4x8xV100-32GB,ib=100")


def test_a_ring_within_a_node():
    assert all_reduce_us(C, Group(1, 1, 1.0), 1e9) == 0.0
    for n in (2, 8):
        time = 2 * (n - 1) * C.intra.latency_s + 2 * (n - 1) / n * 1e9 / C.intra.bandwidth
        assert all_reduce_us(C, Group(n, 1, 1.0), 1e9) == pytest.approx(time * 1e6)
    assert half(C, Group(8, 1, 1.0)).time_us(0) == 0.0


def test_between_nodes_each_rank_moves_its_part():
    # 4 nodes of 8: each rank reduces an eighth in its node, then a node sends 3/4 of the buffer twice.
    inside, between = 2 * 7 / 8 * 1e9 / C.intra.bandwidth, 2 * 3 / 4 * 1e9 / C.inter.bandwidth
    latency = 2 * (7 * C.intra.latency_s + 3 * C.inter.latency_s)
    assert all_reduce_us(C, Group(32, 4, 1.0), 1e9) == pytest.approx((inside + between + latency) * 1e6)
    shared = all_reduce_us(C, Group(32, 4, 0.25), 1e9)
    assert shared == pytest.approx((inside + 4 * between + latency) * 1e6)


def test_groups():
    assert consecutive_group(C, 8, 8) == Group(8, 1, 1.0)
    assert consecutive_group(C, 8, 16) == Group(16, 2, 1.0)
    assert consecutive_group(C, 4, 8) == Group(8, 2, 0.5), "another group may leave the same nodes"
    assert group_of(C, (4, 5, 6, 7, 8, 9, 10, 11)) == Group(8, 2, 0.5)
    assert group_of(C, (0, 1, 8, 9, 16, 17, 24, 25)) == Group(8, 4, 0.25), "a quarter of each node"
    assert group_of(C, (0, 5)) == Group(2, 1, 1.0)


def test_ranks_of_placements():
    small = Cluster.parse("2x4xV100-32GB")
    assert stage_ranks(small, "consecutive", [3, 5]) == [(0, 1, 2), (3, 4, 5, 6, 7)]
    assert stage_ranks(small, "across", [2, 6]) == [(0, 4), (1, 2, 3, 5, 6, 7)]
    assert across_replicas(small, 96, 8, range(1, 9)) == [2, 4, 6]
    assert across_replicas(small, 96, 6, range(1, 9)) == [2, 4, 8]
    assert across_replicas(small, 97, 8, range(1, 9)) == [], "the last microbatches have a sample less"
    assert across_replicas(Cluster.parse("8xH100"), 96, 6, range(1, 9)) == []


def test_between_nodes_the_devices_of_a_node_share_its_link():
    c = Cluster.parse("2x2xV100-32GB")
    crossings = [Crossing(0, (1,), 0.0, 1e6, True)]
    stages = [Stage(0, 0, 2), Stage(1, 1, 2)]

    def edge(ranks):
        (found,) = edges_of(crossings, c, stages, ranks, 4)
        assert found.forward == found.backward
        return found.forward

    assert edge([(0, 1), (2, 3)]) == pytest.approx(c.inter.time_us(4e6)), "all through one link"
    assert edge([(0, 2), (1, 3)]) == pytest.approx(c.intra.time_us(2e6)), "each replica to its neighbour"
    # Both nodes send half of it to the other one, at the same time.
    assert edge([(0, 2), (3, 1)]) == pytest.approx(c.inter.time_us(2e6))


def test_uneven_replicas_overlap_by_samples():
    c = Cluster.parse("1x5xV100-32GB")
    crossings = [Crossing(0, (1,), 0.0, 1e6, False)]
    (found,) = edges_of(crossings, c, [Stage(0, 0, 2), Stage(1, 1, 3)], [(0, 1), (2, 3, 4)], 6)
    assert found.forward == pytest.approx(c.intra.time_us(3e6)) and found.backward is None


def test_slow_links_for_activations_bring_replicas_across_nodes():
    """Large activations and few parameters: pipelines stay in a node, gradients go between nodes."""
    graph = make_graph([8, 9, 10, 11], hidden=8, seq=4096)
    costs = make_costs(graph, [50, 50, 50, 50], device="H100")
    c = Cluster.parse("2x2xH100")
    slow = Cluster(c.nodes, c.devices_per_node, c.device, c.intra, Link("slow", 1e-6, 1e9))
    plan = find_plan(graph, costs, slow, 32, RanncConfig(stages=2))
    assert [s.ranks for s in plan.stages] == [(0, 2), (1, 3)]
    plan.check(graph, 4)
    assert "on all nodes" in plan.why
    # Gradients that cost more than activations bring each stage into a node of its own.
    wide = make_graph([4096, 4097, 4098, 4099], hidden=512, seq=1)
    plan = find_plan(wide, make_costs(wide, [50, 50, 50, 50], device="H100"), slow, 32, RanncConfig(stages=2))
    assert [s.ranks for s in plan.stages] == [(0, 1), (2, 3)]
