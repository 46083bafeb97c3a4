"""Clusters from text and from the present machine."""

from __future__ import annotations

import pytest

from rannc_hf.cost.devices import DEVICES, GIB
from rannc_hf.partition.cluster import Cluster


def test_parse():
    c = Cluster.parse("4x8xV100-32GB,ib=100")
    assert (c.nodes, c.devices_per_node, c.size, c.device) == (4, 8, 32, DEVICES["V100-32GB"])
    assert c.inter.bandwidth == pytest.approx(0.9 * 100e9 / 8)
    assert "4 nodes x 8 x V100-32GB" in str(c) and "InfiniBand 100" in str(c)
    assert Cluster.parse("2xH200").size == 2 and Cluster.parse("h100").size == 1
    c = Cluster.parse("2x4xCPU, memory=3.5, eth=25, link=2")
    assert c.device.memory_bytes == int(3.5 * GIB)
    assert c.inter.name == "Ethernet 25 Gbit/s" and c.intra.bandwidth == 2e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4xV100", "did you mean V100-16GB or V100-32GB"),
        ("2xH20O", "did you mean H200"),
        ("2xTPU", "Known devices: V100-16GB"),
        ("0xCPU", "has no devices"),
        ("32", "is not of the form"),
        ("2x2x2xCPU", "is not of the form"),
        ("", "is not of the form"),
        ("2xCPU,ib=fast", "ib must be a number above 0"),
        ("2xCPU,memory=0", "memory must be a number above 0"),
        ("2xCPU,nvlink=4", "unknown option 'nvlink=4'"),
    ],
)
def test_what_cannot_be_parsed(text, message):
    with pytest.raises(ValueError, match=message):
        Cluster.parse(text)


def test_usable_memory_has_a_margin():
    for c in (Cluster.parse("H200"), Cluster.parse("CPU")):
        assert 0.8 * c.device.memory_bytes < c.usable_bytes < 0.97 * c.device.memory_bytes
    assert Cluster.parse("CPU,memory=0.1").usable_bytes == 0


def test_this_machine():
    c = Cluster.here(8, 4, "cpu")
    assert (c.nodes, c.devices_per_node, c.device.name) == (2, 4, "CPU")
    # The ranks of a node share its memory.
    assert Cluster.here(2, 2, "cpu").device.memory_bytes == pytest.approx(2 * c.device.memory_bytes, rel=0.01)
    with pytest.raises(ValueError, match="all nodes must run equally many"):
        Cluster.here(7, 4, "cpu")
