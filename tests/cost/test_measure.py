"""Measured costs: the same table as the analytic one, with times that were taken."""

from __future__ import annotations

import pytest
import torch
from graphs import make_graph

from rannc_hf.cost import measure
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.devices import DEVICES
from rannc_hf.cost.measure import measured_costs
from rannc_hf.cost.table import BlockCost
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.search import find_plan

GRAPH = make_graph([16, 16, 16, 32], skips=[(0, 2)])
CPU = torch.device("cpu")


def test_every_unique_block_is_measured_once(monkeypatch):
    runs = []
    original = measure.block_function
    monkeypatch.setattr(
        measure, "block_function", lambda g, b, n, *rest: runs.append((b.key, n)) or original(g, b, n, *rest)
    )
    table = measured_costs(GRAPH, DEVICES["CPU"], CPU, 8)
    assert table.source == "measured" and len(runs) == len(set(runs)) == len(table.points) * 4
    analytic = analytic_costs(GRAPH, DEVICES["CPU"], 8)
    for block in GRAPH.blocks:
        for samples in (1, 2, 4, 8):
            ours, theirs = table.of(block, samples), analytic.of(block, samples)
            assert ours.forward_us > 0 and ours.backward_us > 0
            assert (ours.saved_bytes, ours.output_bytes) == (theirs.saved_bytes, theirs.output_bytes)
    cluster = Cluster.parse("2xCPU")
    find_plan(GRAPH, table, cluster, 8).check(GRAPH, 2)


def test_larger_blocks_take_longer():
    graph = make_graph([8, 8, 4096], hidden=64, seq=64)
    table = measured_costs(graph, DEVICES["CPU"], CPU, 4)
    small, large = (table.of(graph.blocks[k], 4) for k in (1, 2))
    assert large.forward_us > 3 * small.forward_us


def test_slow_blocks_are_measured_with_few_samples(monkeypatch):
    monkeypatch.setattr(measure, "_ENOUGH_US", 0.0)
    table = measured_costs(GRAPH, DEVICES["CPU"], CPU, 64)
    assert all([p.samples for p in points] == [1, 2] for points in table.points.values())
    assert (
        table.of(GRAPH.blocks[0], 64).saved_bytes
        == analytic_costs(GRAPH, DEVICES["CPU"], 64).of(GRAPH.blocks[0], 64).saved_bytes
    )


def test_what_does_not_fit(monkeypatch):
    def full(subject, samples, device):
        if samples > 2 or subject.block.index == 3:
            raise torch.OutOfMemoryError
        return BlockCost(samples, 1.0, 2.0, 1.0, 8, 8, 8)

    monkeypatch.setattr(measure, "_point", full)
    with pytest.raises(ValueError, match=r"block 3 \(layer.3\) does not fit on cpu with 1 sample"):
        measured_costs(GRAPH, DEVICES["CPU"], CPU, 8)


def test_random_numbers_of_the_user_go_on():
    state = torch.random.get_rng_state()
    measured_costs(GRAPH, DEVICES["CPU"], CPU, [2])
    assert torch.equal(torch.random.get_rng_state(), state)
