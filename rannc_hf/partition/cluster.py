"""`Cluster`: the devices a plan is for, and the links between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from rannc_hf.cost.devices import GIB, Device, Link, device, ethernet, infiniband
from rannc_hf.cost.stored import present_device

_FORM = "NODESxDEVICESxDEVICE[,option=value], e.g. 4x8xV100-32GB,ib=100 or 2xH200 or 4xCPU or 8xhere"
_OPTIONS = {
    "ib": "InfiniBand between nodes, Gbit/s a node",
    "eth": "Ethernet between nodes, Gbit/s a node",
    "link": "between devices of a node, GB/s in one direction",
    "memory": "memory of a device, GiB",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` nodes of `devices_per_node` equal devices; rank r is device `r % devices_per_node` of its node."""

    nodes: int
    devices_per_node: int
    device: Device
    intra: Link
    inter: Link

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.nodes * self.devices_per_node

    @property
    def usable_bytes(self) -> int:
        """Memory of a device that a plan may use: less what the driver takes, and 4 % for what is not foreseen."""
        return max(0, int(self.device.memory_bytes * 0.96) - self.device.reserved_bytes)

    def node(self, rank: int) -> int:
        return rank // self.devices_per_node

    def part(self, nodes: int, devices_per_node: int) -> Cluster:
        """The first `devices_per_node` devices of each of the first `nodes` nodes."""
        assert nodes <= self.nodes and devices_per_node <= self.devices_per_node, (nodes, devices_per_node, self)
        return replace(self, nodes=nodes, devices_per_node=devices_per_node)

    def rank_of(self, part: Cluster, rank: int) -> int:
        """The rank here of rank `rank` of a `part`."""
        return part.node(rank) * self.devices_per_node + rank % part.devices_per_node

    def used_by(self, ranks: Collection[int]) -> tuple[Cluster, dict[int, int]]:
        """The cluster that `ranks` make up, and the rank of each in it.

        That is all of this one where they are not equally many on each node that they are on.
        """
        nodes: dict[int, list[int]] = defaultdict(list)
        for rank in sorted(ranks):
            nodes[self.node(rank)].append(rank)
        each = {len(own) for own in nodes.values()}
        if len(each) > 1:
            return self, {rank: rank for rank in ranks}
        return self.part(len(nodes), each.pop()), {rank: i for i, rank in enumerate(sorted(ranks))}

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """A cluster from `4x8xV100-32GB,ib=100` (nodes, devices a node, device), `2xH200` or `H200`.

        The device `here` is this machine's, with the figures `rannc doctor` measured on it: `4x8xhere`.

        Raises ValueError that says what is wrong and shows the form.
        """
        shape, *options = (part.strip() for part in text.split(","))
        match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?(\D.*)", shape)
        if match is None:
            raise ValueError(f"cluster {text!r} is not of the form {_FORM}")
        first, second, name = match.groups()
        nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
        if nodes < 1 or per_node < 1:
            raise ValueError(f"cluster {text!r} has no devices; the form is {_FORM}")
        found = device(name) if name != "here" else present_device(_here(), per_node)
        cluster = cls(nodes, per_node, found, found.intra, found.inter)
        for option in options:
            cluster = cluster._with_option(option, text)
        return cluster

    def _with_option(self, option: str, text: str) -> Cluster:
        key, _, number = option.partition("=")
        if key not in _OPTIONS:
            known = "; ".join(f"{k}: {v}" for k, v in _OPTIONS.items())
            raise ValueError(f"cluster {text!r}: unknown option {option!r}. Options: {known}")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"cluster {text!r}: {key} must be a number above 0 ({_OPTIONS[key]}), not {number!r}")
        if key == "memory":
            return replace(self, device=replace(self.device, memory_bytes=int(value * GIB)))
        if key == "link":
            return replace(self, intra=Link(f"link {value:g} GB/s", self.intra.latency_s, value * 1e9))
        return replace(self, inter=infiniband(value) if key == "ib" else ethernet(value))

    @classmethod
    def here(cls, world_size: int, local_world_size: int, device_type: str) -> Cluster:
        """The cluster this process runs in: `world_size` ranks, `local_world_size` a node, on "cuda" or "cpu".

        Raises ValueError where nodes have different numbers of ranks.
        """
        if world_size % local_world_size:
            raise ValueError(
                f"{world_size} processes with {local_world_size} on this node: all nodes must run equally many"
            )
        found = present_device(device_type, local_world_size)
        return cls(world_size // local_world_size, local_world_size, found, found.intra, found.inter)

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes x " if self.nodes > 1 else ""
        between = f", {self.inter.name} between nodes" if self.nodes > 1 else ""
        within = f", {self.intra.name}" if self.devices_per_node > 1 else ""
        return f"{nodes}{self.devices_per_node} x {self.device}{within}{between}"


def _here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
