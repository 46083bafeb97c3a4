"""Bytes that each rank of a stage holds, term by term; the engine must never need more.

    peak = state + microbatches in flight x kept activations + workspace + transient buffers

state: masters, gradient sums, two moments and copies to compute with, by what the replicas divide among them (`state`).
kept activations: what autograd keeps of a microbatch, or with recomputation the inputs of each block; and what was
received. workspace: what one block needs while it runs, with recomputation also what it keeps, less what blocks after
it do not hold then; and workspaces of libraries. transient: gradients and copies of a block that are not kept but are
on their way to or from their owners (`transient`). Where the script computes the loss from the outputs, gradients of
these are kept with the activations, and each rank holds the outputs of its own samples besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rannc_hf.capture.graph import Block, Graph, ValueSpec
from rannc_hf.cost.memory import parameter_bytes
from rannc_hf.partition.shards import owners, shardable

Floats = npt.NDArray[np.float64]
Number = TypeVar("Number", float, Floats)

ALIGNMENT = 64
"""Parameters start at multiples of this many elements in flat buffers: vectorised kernels need aligned addresses."""
_MOMENTS = 2
"""Adam's. Optimizers with less state leave memory unused."""


@dataclass(frozen=True)
class ParameterSize:
    """Bytes of a parameter."""

    elements: int
    master: int
    """Bytes of the master; of its gradient sum and of each moment too."""
    copy: int
    """Bytes of a copy in the dtype it is computed with."""
    trained: bool
    """Whether the loss sends it a gradient."""
    padding: int
    """Bytes that its places in flat buffers are longer than it; counted on every rank, whoever owns it."""

    @property
    def separate(self) -> int:
        """Bytes of the compute copy next to a master; a parameter computed with in the master's dtype needs none."""
        return self.copy if self.copy < self.master else 0

    @property
    def whole(self) -> int:
        """Bytes of its state on a rank that divides nothing."""
        return (self.master * (2 + _MOMENTS) if self.trained else self.master) + self.separate + self.padding


def parameter_sizes(graph: Graph) -> dict[str, ParameterSize]:
    """Sizes of all parameters, by name."""
    live = graph.gradient_parameters()
    sizes = {}
    for name, spec in graph.parameters.items():
        compute = parameter_bytes(graph, name) // max(1, spec.numel)
        padding = -spec.numel % ALIGNMENT * ((2 + _MOMENTS) * max(4, compute) + compute)
        size = ParameterSize(spec.numel, spec.numel * max(4, compute), spec.numel * compute, name in live, padding)
        sizes[name] = size
    return sizes


def shared(shard: str, master: Number, copy: Number, separate: Number) -> Number:
    """Bytes that every rank holds of parameters of which `shard` is divided.

    `master`, `copy` and `separate` are sums of those bytes over the parameters. A rank that does not own a parameter
    computes with a copy even where the owner uses its master.
    """
    if shard == "none":
        return master * (2 + _MOMENTS) + separate
    if shard == "optimizer":
        return master + copy
    return copy if shard == "gradients" else copy * 0.0


def owned(shard: str, size: ParameterSize) -> int:
    """Bytes that the owner of a parameter holds of it besides what every rank does."""
    if shard == "none":
        return 0
    # Where a master is its own copy, the owner holds no second one.
    saved = 0 if size.separate else size.copy
    if shard == "optimizer":
        return size.master * (1 + _MOMENTS) - saved
    whole = size.master * (2 + _MOMENTS)
    return whole - saved if shard == "gradients" else whole + size.separate


def transient(shard: str, gradients: Number, copies: Number) -> Number:
    """Bytes of buffers on their way: `gradients` of the largest block, `copies` of the largest two neighbours."""
    if shard in ("none", "optimizer"):
        return gradients * 0.0
    return gradients if shard == "gradients" else gradients + copies


def returned_bytes(graph: Graph, block: Block, samples: int) -> int:
    """Bytes of the outputs of `block` that the script computes the loss from; zero where the model computes it."""
    if not graph.split:
        return 0
    return sum(graph.values[v].bytes_at(samples) for v in block.outputs if v in graph.outputs.values())


def own_bytes(graph: Graph, samples: int) -> int:
    """Bytes that a rank holds of the outputs of its own `samples`: these and their gradients, in fp32 as well."""
    if not graph.split:
        return 0
    specs = [graph.values[v] for v in dict.fromkeys(graph.outputs.values())]
    return sum(2 * (s.bytes_at(samples) + _wide_bytes(s, samples)) for s in specs)


def _wide_bytes(spec: ValueSpec, samples: int) -> int:
    """Bytes of the fp32 copy of an output in low precision."""
    low = spec.dtype.is_floating_point and spec.dtype.itemsize < 4
    return 4 // spec.dtype.itemsize * spec.bytes_at(samples) if low else 0


def owned_elements_bound(elements: Floats, largest: Floats, replicas: Floats) -> Floats:
    """No replica owns more elements: an even share and the largest parameter (see `owners`)."""
    return np.minimum(elements, elements / replicas + largest * (1 - 1 / replicas))


@dataclass(frozen=True)
class OwnedLoad:
    """What the replica that owns the most holds beyond the others' share."""

    bytes: int
    elements: int


def owned_load(
    graph: Graph, sizes: Mapping[str, ParameterSize], shard: str, blocks: tuple[int, int], replicas: int
) -> OwnedLoad:
    """The largest owner's load in a stage of `blocks` (first, last), as the engine divides it."""
    divided = shardable(graph, *blocks)
    if shard == "none" or replicas == 1:
        return OwnedLoad(0, sum(divided.values()))
    held, elements = [0] * replicas, [0] * replicas
    for name, owner in owners(divided, replicas).items():
        held[owner] += owned(shard, sizes[name])
        elements[owner] += divided[name]
    return OwnedLoad(max(held), max(elements))
