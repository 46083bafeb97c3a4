"""The beginning and the end of a step on a stage: copies from owners, reduction of gradients, optimizer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rannc_hf.cost.devices import Device
from rannc_hf.partition.collectives import Half
from rannc_hf.partition.memory import Floats
from rannc_hf.partition.segments import Holdings

# AdamW with a gradient clip and a cast to 16 bits: fitted to steps measured on an H200 (12 ms for 336 million elements
# in 398 parameters, 80 ms for 4.9 billion in 1550).
_OPTIMIZER_BYTES = 44
"""Bytes a trained element moves in an optimizer step, at the peak bandwidth."""
_OPTIMIZER_OPERATIONS = 2.5
"""Operations an optimizer step issues for each parameter."""


class Work(NamedTuple):
    """What a stage (or each of an array of stages) has to do around its computes."""

    backward_us: Floats
    """Of one microbatch, without recomputation."""
    blocks: Floats
    first_bytes: Floats
    """Gradients that are complete last: of the first block."""
    gradient_bytes: Floats
    """Of divided parameters, as those below; parameters tied to other stages come on their own."""
    copy_bytes: Floats
    elements: Floats
    """Trained ones that a rank steps: those it owns and whole ones."""
    tensors: Floats


class Ends(NamedTuple):
    """Microseconds of each part."""

    head: Floats
    """Before the first forward: owners send copies of their parameters."""
    reduce: Floats
    """Reducing the last gradients."""
    exposed: Floats
    """What of that comes after the last backward."""
    optimizer: Floats

    @property
    def total(self) -> Floats:
        return np.asarray(self.head + self.exposed + self.optimizer)


def ends_of(device: Device, shard: str, half: Half | tuple[Floats, Floats], work: Work) -> Ends:
    """Head and tail of stages with the sharding `shard`; `half` costs of their groups, each 0 with one replica."""
    latency, rate = half
    none = np.zeros_like(work.gradient_bytes * rate)
    times = 2.0 if shard == "none" else 1.0
    first = times * (latency + work.first_bytes * rate)
    if shard in ("none", "optimizer"):
        # One message a block, so that all but the last overlap with the backward that goes on.
        reduce = times * (latency * work.blocks + work.gradient_bytes * rate)
        hidden = work.backward_us * (1 - 1 / work.blocks) if device.overlaps else 0.0
        exposed = np.maximum(first, reduce - hidden)
    else:
        # All but the first block's are part of the backward of each microbatch.
        reduce = exposed = first if device.overlaps else none
    head = latency * work.blocks + work.copy_bytes * rate if shard in ("optimizer", "gradients") else none
    optimizer = work.elements * _OPTIMIZER_BYTES / device.memory_bandwidth * 1e6
    optimizer = optimizer + work.tensors * _OPTIMIZER_OPERATIONS * max(device.host_us, device.kernel_us)
    trains = work.gradient_bytes > 0
    head, reduce, exposed = (np.where(trains, a, 0.0) for a in (head, reduce, exposed))
    return Ends(head, reduce, exposed, np.asarray(optimizer))


def work_of(
    holdings: Holdings, blocks: tuple[int, int], shard: str, replicas: int, backward_us: float, owned_elements: float
) -> Work:
    """The work of one stage of `blocks` (first, last); its busiest rank steps `owned_elements` of the divided ones."""
    first, last = blocks
    numbers = (
        backward_us,
        last - first + 1,
        holdings.block_gradients[first] + holdings.inner_gradients[blocks],
        holdings.gradient_bytes[blocks],
        holdings.copy_bytes[blocks],
        owned_elements + holdings.whole_elements[blocks],
        holdings.tensors[blocks] / (1 if shard == "none" else replicas) + holdings.whole_tensors[blocks],
    )
    return Work(*(np.asarray(float(n)) for n in numbers))
