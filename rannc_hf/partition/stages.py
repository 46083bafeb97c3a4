"""`StageModel`: time and memory of every possible stage, for one number of microbatches.

Legend: i, j first and last block; r replicas; h microbatches in flight; d devices used by a stage and those after it.
Arrays are [i, r, j]. All replicas of a stage are as slow as the one with the most samples.

A step with M microbatches is estimated as

    sum over stages of (t + 2 x)  +  max over stages of ((M - 1) p + tail)

t is forward and backward of one microbatch (with recomputation), x and y are transfers of one microbatch into and out
of the stage, and tail is what is left of the gradient reduction when the backwards are done, and the optimizer. The
first term is the first microbatch on its way through all stages and back, the second what the slowest stage adds: a
microbatch every p = max(t, x + y) under GPipe, p = t + x + y under 1F1B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rannc_hf.capture.graph import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB, Link
from rannc_hf.cost.table import BlockCost, CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.segments import Floats, Segments, segments

# AdamW with a gradient clip and a cast to 16 bits: fitted to steps measured on an H200 (12 ms for 336 million elements
# in 398 parameters, 80 ms for 4.9 billion in 1550).
_OPTIMIZER_BYTES = 44
"""Bytes a trained element moves in an optimizer step, at the peak bandwidth."""
_OPTIMIZER_OPERATIONS = 2.5
"""Operations an optimizer step issues for each parameter."""
_NEVER = float("inf")


class Stage(NamedTuple):
    """A stage of a candidate: blocks `first` to `last`, `replicas` ranks."""

    first: int
    last: int
    replicas: int


class Ways(NamedTuple):
    """Whether a stage's transfers in, transfers out and gradient reduction leave the node."""

    into: bool
    out: bool
    reduce: bool


@dataclass(frozen=True)
class Problem:
    """What is planned: a graph with its costs, on a cluster, for a global batch, within the user's options."""

    graph: Graph
    costs: CostTable
    cluster: Cluster
    batch_size: int
    config: RanncConfig
    segments: Segments = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", segments(self.graph))

    @property
    def memory_bytes(self) -> float:
        """What a plan may use of each device."""
        if self.config.memory_limit_gib != "auto":
            return self.config.memory_limit_gib * GIB
        return self.cluster.usable_bytes

    def ways(self, first_rank: int, replicas: int) -> Ways:
        """Which links a stage on consecutive ranks uses. Its neighbours are taken to be near its boundaries."""
        node, last = self.cluster.node, first_rank + replicas - 1
        spans = node(first_rank) != node(last)
        into = first_rank > 0 and (spans or node(first_rank - 1) != node(first_rank))
        out = last + 1 < self.cluster.size and (spans or node(last) != node(last + 1))
        return Ways(into, out, spans)


class StageModel:
    """Costs of all stages when the batch is cut into `microbatches`; `replicas` are the numbers to consider."""

    def __init__(self, problem: Problem, microbatches: int, replicas: Sequence[int]) -> None:
        self.problem, self.microbatches = problem, microbatches
        self.replicas = list(replicas)
        self.samples = -(-problem.batch_size // microbatches)
        seg = problem.segments
        n = seg.count
        shape = (n, len(self.replicas), n)
        self.forward, self.backward = np.zeros(shape), np.zeros(shape)
        self.kept_none, self.kept_blocks, self.extra_none, self.extra_blocks = (np.zeros(shape) for _ in range(4))
        self.work = np.full(n, _NEVER)
        self.sum_bound = _NEVER
        for index, r in enumerate(self.replicas):
            self._fill(index, -(-self.samples // r), r)
        self._tails()

    # -- arrays ------------------------------------------------------------------------------------------------------

    def _fill(self, index: int, samples: int, replicas: int) -> None:
        seg = self.problem.segments
        costs = self._block_costs(samples)
        forward, backward, saved, output, workspace = (
            np.array([getattr(c, name) for c in costs], dtype=np.float64)
            for name in ("forward_us", "backward_us", "saved_bytes", "output_bytes", "workspace_bytes")
        )
        self.work = np.minimum(self.work, (forward + backward) * replicas)
        self.sum_bound = min(self.sum_bound, float((forward + backward).sum()))
        self.forward[:, index] = _sums(forward)
        self.backward[:, index] = _sums(backward)
        received = seg.received.at(samples)
        largest = _maxima(workspace) + received
        self.kept_none[:, index] = _sums(saved) + received
        self.kept_blocks[:, index] = _sums(output) + received
        self.extra_none[:, index] = largest
        # One block is computed again at a time.
        self.extra_blocks[:, index] = largest + _maxima(saved)

    def _block_costs(self, samples: int) -> list[BlockCost]:
        known: dict[str, BlockCost] = {}
        for block in self.problem.graph.blocks:
            if block.key not in known:
                known[block.key] = self.problem.costs.of(block, samples)
        return [known[b.key] for b in self.problem.graph.blocks]

    def _tails(self) -> None:
        cluster, seg, r = self.problem.cluster, self.problem.segments, np.array(self.replicas)[None, :, None]
        n = seg.count
        blocks = np.maximum(1, np.arange(n)[None, :] - np.arange(n)[:, None] + 1)[:, None, :]
        held = (a[:, None, :] for a in (seg.gradient_bytes, seg.trained, seg.tensors))
        work = TailWork(self.backward, blocks, *held)
        self.tail = {wide: tail_of(cluster, wide, r, work).total for wide in (False, True)}
        limit = self.problem.memory_bytes - seg.state_bytes[:, None, :]
        tiny = 1e-9
        self.flight_none = np.floor((limit - self.extra_none) / (self.kept_none + tiny))
        self.flight_blocks = np.floor((limit - self.extra_blocks) / (self.kept_blocks + tiny))
        self.time_none = self.forward + self.backward
        self.time_blocks = self.time_none + self.forward
        choice = self.problem.config.recompute
        if choice == "blocks":
            self.flight_none[:] = -1
        if choice == "none":
            self.flight_blocks[:] = -1
        entering = seg.entering
        # [replicas, boundary]: one replica's share within a node; a node's whole microbatch between nodes.
        self.transfer = {
            False: np.array([_times(cluster.intra, entering.at(-(-self.samples // k))) for k in self.replicas]),
            True: np.array([_times(cluster.inter, entering.at(self.samples)) for _ in self.replicas]),
        }

    # -- rows for the search -----------------------------------------------------------------------------------------

    def rows(self, i: int, ways: Ways, levels: Sequence[int], schedule: str, ceiling: float) -> Floats:
        """[level, r, j - i] what stages that start at block i add to the sum, or infinity.

        It is infinity where the stage does not fit with `levels[level]` microbatches in flight, or where its part of
        the maximum exceeds `ceiling`. Last blocks that are impossible for all levels and replicas are left out.
        """
        added = []
        into = self.transfer[ways.into][:, i, None]
        moved = into + self.transfer[ways.out][:, i + 1 :]
        for time in (self.time_none[i, :, i:], self.time_blocks[i, :, i:]):
            slowest = self._slowest(time, moved, self.tail[ways.reduce][i, :, i:], schedule)
            added.append(np.where(slowest <= ceiling, time + 2 * into, _NEVER))
        last = np.flatnonzero(np.isfinite(added[0]).any(axis=0))
        stop = int(last[-1]) + 1 if len(last) else 0
        none, blocks = (a[:, :stop] for a in added)
        fits_none, fits_blocks = (f[i, :, i : i + stop] for f in (self.flight_none, self.flight_blocks))
        result = np.empty((len(levels), len(self.replicas), stop))
        for index, level in enumerate(levels):
            result[index] = np.where(fits_none >= level, none, np.where(fits_blocks >= level, blocks, _NEVER))
        return result

    def _slowest(self, time: Floats, moved: Floats, tail: Floats, schedule: str) -> Floats:
        # Under 1F1B a microbatch must be back before the next one starts, so its transfers are not hidden.
        each = np.maximum(time, moved) if schedule == "gpipe" else time + moved
        return np.asarray((self.microbatches - 1) * each + tail)

    # -- single stages -----------------------------------------------------------------------------------------------

    def recompute(self, stage: Stage, in_flight: int) -> str | None:
        """The cheapest way to hold the activations of `in_flight` microbatches; None where nothing fits."""
        at = self._at(stage)
        if self.flight_none[at] >= in_flight:
            return "none"
        return "blocks" if self.flight_blocks[at] >= in_flight else None

    def terms(self, stage: Stage, ways: Ways, recompute: str, schedule: str) -> tuple[float, float]:
        """What a stage adds to the sum, and its part of the maximum, in microseconds."""
        at = self._at(stage)
        time = float((self.time_none if recompute == "none" else self.time_blocks)[at])
        into = float(self.transfer[ways.into][at[1], stage.first])
        moved = into + float(self.transfer[ways.out][at[1], stage.last + 1])
        slowest = self._slowest(np.array(time), np.array(moved), self.tail[ways.reduce][at], schedule)
        return time + 2 * into, float(slowest)

    def times(self, stage: Stage, recompute: str) -> tuple[float, float]:
        """Forward and backward of one microbatch in microseconds; the backward computes again where asked to."""
        forward, backward = float(self.forward[self._at(stage)]), float(self.backward[self._at(stage)])
        return forward, backward + (forward if recompute == "blocks" else 0.0)

    def tail_us(self, stage: Stage, ways: Ways) -> float:
        """What remains after the last backward: gradients to reduce, and the optimizer."""
        return float(self.tail[ways.reduce][self._at(stage)])

    def memory(self, stage: Stage, in_flight: int, recompute: str) -> int:
        """Peak bytes on each rank of a stage."""
        at = self._at(stage)
        kept, extra = (
            (self.kept_none, self.extra_none) if recompute == "none" else (self.kept_blocks, self.extra_blocks)
        )
        state = self.problem.segments.state_bytes[stage.first, stage.last]
        return int(state + in_flight * kept[at] + extra[at])

    def _at(self, stage: Stage) -> tuple[int, int, int]:
        return stage.first, self.replicas.index(stage.replicas), stage.last

    @property
    def step_bound(self) -> float:
        """No plan with this many microbatches is faster: all devices busy all the time."""
        return self.microbatches * float(self.work.sum()) / self.problem.cluster.size


class TailWork(NamedTuple):
    """What a stage (or each of an array of stages) has to do around and after its last backward."""

    backward_us: Floats
    """Without recomputation."""
    blocks: Floats
    gradient_bytes: Floats
    trained: Floats
    tensors: Floats


class Tail(NamedTuple):
    """Microseconds of the gradient reduction, of the part of it after the last backward, and of the optimizer."""

    reduce: Floats
    exposed: Floats
    optimizer: Floats

    @property
    def total(self) -> Floats:
        """From the last backward to the end of the step."""
        return np.asarray(self.exposed + self.optimizer)


def tail_of(cluster: Cluster, between_nodes: bool, replicas: Floats, work: TailWork) -> Tail:
    """The end of a step for stages of `replicas` each, in one node or over several."""
    link, device, r = cluster.inter if between_nodes else cluster.intra, cluster.device, replicas
    # One message a block, so that all but the last overlap with the backward that goes on.
    messages = 2 * (r - 1) * link.latency_s * work.blocks
    reduce = (messages + 2 * (r - 1) / r * work.gradient_bytes / link.bandwidth) * 1e6
    hidden = work.backward_us * (1 - 1 / work.blocks) if device.overlaps else 0.0
    exposed = np.maximum(reduce / work.blocks, reduce - hidden)
    optimizer = work.trained * _OPTIMIZER_BYTES / device.memory_bandwidth * 1e6
    optimizer = optimizer + work.tensors * _OPTIMIZER_OPERATIONS * max(device.host_us, device.kernel_us)
    return Tail(reduce, exposed, optimizer)


def in_flight(schedule: str, stages: int, stage: int, microbatches: int) -> int:
    """Microbatches whose activations a stage holds at once: all under GPipe; under 1F1B one a stage that follows."""
    return microbatches if schedule == "gpipe" else min(microbatches, stages - stage)


def _sums(values: Floats) -> Floats:
    """[i, j] sum of values i to j."""
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(prefix[None, 1:] - prefix[:-1, None])


def _maxima(values: Floats) -> Floats:
    """[i, j] largest of values i to j."""
    upper = np.triu(np.broadcast_to(values, (len(values), len(values))))
    return np.asarray(np.maximum.accumulate(upper, axis=1))


def _times(link: Link, sizes: Floats) -> Floats:
    return np.where(sizes > 0, (link.latency_s + sizes / link.bandwidth) * 1e6, 0.0)
