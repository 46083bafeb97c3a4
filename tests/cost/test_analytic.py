"""Analytic costs and the table they are kept in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graphs import make_costs, make_graph

from rannc_hf.cost.analytic import analytic_costs, main_dtype
from rannc_hf.cost.devices import DEVICES, device, ethernet, infiniband, present_gpu
from rannc_hf.cost.table import BlockCost

GRAPH = make_graph([4096, 4096, 4096, 2048], hidden=1024, seq=128, dtype=torch.bfloat16)


def test_unique_blocks_are_computed_once_at_powers_of_two():
    table = analytic_costs(GRAPH, DEVICES["H200"], 12)
    # The first and the last block differ from those between: no gradient goes into the batch, and the loss.
    assert len(table.points) == 3
    assert {tuple(p.samples for p in points) for points in table.points.values()} == {(1, 2, 4, 8, 12)}
    assert table.dtype == torch.bfloat16 == main_dtype(GRAPH)


def test_times_follow_flops_where_they_are_many():
    table = analytic_costs(GRAPH, DEVICES["H200"], [64, 128])
    at_64, at_128 = (table.of(GRAPH.blocks[1], n) for n in (64, 128))
    assert 1.8 < at_128.forward_us / at_64.forward_us <= 2.0
    flops = 2 * 2 * 128 * 128 * 1024 * 4096
    peak_us = flops / 989e12 * 1e6
    assert peak_us < at_128.forward_us < 2 * peak_us
    assert 1.7 < at_128.backward_us / at_128.forward_us < 2.7


def test_small_blocks_take_as_long_as_their_operations_take_to_issue():
    graph = make_graph([8, 8], hidden=8)
    table = analytic_costs(graph, DEVICES["H200"], 1)
    assert table.of(graph.blocks[0], 1).forward_us == 3 * DEVICES["H200"].host_us


def test_faster_devices_are_faster():
    order = ["V100-32GB", "A100-80GB", "H200", "B200"]
    graph = make_graph([8192, 8192], hidden=2048, seq=512, dtype=torch.float16)
    times = [analytic_costs(graph, DEVICES[d], [16]).of(graph.blocks[1], 16).forward_us for d in order]
    assert times == sorted(times, reverse=True) and times[0] > 4 * times[-1]


def test_a_frozen_parameter_costs_no_gradient():
    first = GRAPH.blocks[0]
    table = analytic_costs(GRAPH, DEVICES["H200"], [32])
    # The first block's input is the batch: one product fewer than in the second.
    assert table.of(first, 32).backward_us < table.of(GRAPH.blocks[1], 32).backward_us


def test_interpolation():
    graph = make_graph([8, 9])
    table = make_costs(graph, [10, 20])
    block = graph.blocks[0]
    assert table.of(block, 1) == BlockCost(1, 11.0, 22.0, 11.0, 1000, 128, 64)
    assert table.of(block, 5) == BlockCost(5, 51.0, 102.0, 51.0, 5000, 640, 320)
    wide = dataclasses.replace(table, points={block.key: (table.of(block, 2), table.of(block, 10))})
    assert wide.of(block, 6) == table.of(block, 6)
    assert wide.of(block, 1) == table.of(block, 2), "below the first point nothing is known"
    assert "layer.0" in str(table) and "measured" in str(table)
    with pytest.raises(ValueError, match=r"block 1 \(layer.1\) is not in this cost table"):
        wide.of(graph.blocks[1], 2)


def test_links():
    assert infiniband(100).time_us(0) == 0.0
    assert infiniband(100).time_us(11.25e9) == pytest.approx(1e6, rel=1e-3)
    assert ethernet(10).bandwidth == pytest.approx(1e9)


def test_device_names():
    assert device("h200") is DEVICES["H200"]
    with pytest.raises(ValueError, match="did you mean A100-40GB or A100-80GB"):
        device("A100")
    assert present_gpu("NVIDIA H200", 150 * 10**9).memory_bandwidth == DEVICES["H200"].memory_bandwidth
    assert present_gpu("Tesla V100-SXM2-16GB", 16 * 10**9).name == "V100-16GB"
    unknown = present_gpu("Some GPU", 7 * 10**9)
    assert (unknown.name, unknown.memory_bytes) == ("Some GPU", 7 * 10**9)


def test_rates_by_dtype():
    assert DEVICES["V100-32GB"].rate(torch.bfloat16) == DEVICES["V100-32GB"].rate(torch.float32)
    assert DEVICES["A100-40GB"].rate(torch.bfloat16) == 312e12
    assert DEVICES["H100"].rate(torch.float64) == DEVICES["H100"].rate(torch.float32) / 2
