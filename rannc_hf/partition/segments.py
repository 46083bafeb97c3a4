"""What a stage of consecutive blocks holds and receives, for every first and last block at once.

Arrays are indexed [i, j]: blocks i to j inclusive; entries with j < i mean nothing. n is the number of blocks.
Sizes of values are linear in samples: `constant + per_sample * samples` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rannc_hf.capture.graph import Graph
from rannc_hf.partition.memory import Floats, ParameterSize, owned, owned_load, parameter_sizes, shared, transient
from rannc_hf.partition.shards import SHARDS


@dataclass(frozen=True)
class Linear:
    """Bytes as a function of samples, over an array."""

    constant: Floats
    per_sample: Floats

    def at(self, samples: int) -> Floats:
        return self.constant + self.per_sample * samples


@dataclass(frozen=True)
class Crossing:
    """A value that later blocks use."""

    producer: int
    consumers: tuple[int, ...]
    constant: float
    per_sample: float
    needs_grad: bool


@dataclass(frozen=True)
class Tied:
    """A trained parameter that several blocks use."""

    name: str
    users: tuple[int, ...]
    gradient_bytes: float


@dataclass(frozen=True)
class Holdings:
    """Parameters of all runs of blocks. A run divides those that no block outside of it uses; the others are whole."""

    whole_bytes: Floats
    """[i, j] state of whole parameters, and the padding of all."""
    whole_elements: Floats
    """[i, j] trained ones."""
    whole_tensors: Floats
    tied_bytes: Floats
    """[i, j] gradients of trained parameters that other stages use too."""
    elements: Floats
    """[i, j] of divided parameters."""
    tensors: Floats
    largest: Floats
    """[i, j] elements of the largest divided parameter."""
    gradient_bytes: Floats
    """[i, j] of divided parameters."""
    copy_bytes: Floats
    """[i, j] copies of divided parameters to compute with."""
    block_gradients: Floats
    """[k] of parameters that block k alone uses."""
    block_copies: Floats
    """[k] of parameters that block k alone uses."""
    inner_gradients: Floats
    """[i, j] of divided parameters that several blocks use."""
    inner_copies: Floats
    """[i, j] of those, once for each block that uses them."""
    shared_bytes: dict[str, Floats]
    """[i, j] of state and transient buffers on every rank, whole parameters included, by what is divided."""
    owned_each: dict[str, float]
    """Bytes an owner holds for an element at most, besides what every rank holds, by what is divided."""


@dataclass(frozen=True)
class Segments:
    """Facts about all runs of blocks of a graph that depend on neither device nor batch."""

    count: int
    holdings: Holdings
    received: Linear
    """[i, j] values of earlier blocks, and values computed from the batch alone, that the run uses."""
    entering: Linear
    """[i], n + 1 entries: values that cross the boundary before block i."""
    crossings: tuple[Crossing, ...]
    tied: tuple[Tied, ...]
    sizes: dict[str, ParameterSize]

    def state_bytes(self, graph: Graph, shard: str, blocks: tuple[int, int], replicas: int) -> int:
        """Bytes that the rank that owns the most holds for the parameters of a stage of `blocks` (first, last)."""
        load = owned_load(graph, self.sizes, shard, blocks, replicas)
        return int(np.ceil(self.holdings.shared_bytes[shard][blocks] + load.bytes))

    @property
    def whole_bytes(self) -> float:
        """Bytes of the state of all parameters, once."""
        return float(self.holdings.shared_bytes["none"][0, -1])


def segments(graph: Graph) -> Segments:
    """Measure all runs of blocks of `graph`."""
    count = len(graph.blocks)
    crossings = _crossings(graph)
    shape = (count, count)
    received = Linear(np.zeros(shape), np.zeros(shape))
    entering = Linear(np.zeros(count + 1), np.zeros(count + 1))
    for value in crossings:
        for array, amount in ((received.constant, value.constant), (received.per_sample, value.per_sample)):
            _add(array, value.consumers, amount, value.producer + 1)
        entering.constant[value.producer + 1 : value.consumers[-1] + 1] += value.constant
        entering.per_sample[value.producer + 1 : value.consumers[-1] + 1] += value.per_sample
    for name, users in _users((b.index, n) for b in graph.blocks for n in b.preamble if n in graph.values).items():
        constant, per_sample = _linear(graph, name)
        _add(received.constant, users, constant)
        _add(received.per_sample, users, per_sample)
    sizes = parameter_sizes(graph)
    users_of = _users((b.index, n) for b in graph.blocks for n in dict.fromkeys(b.parameters))
    # Parameters that no block uses are held by the first stage.
    users_of |= {name: [0] for name in graph.parameters if name not in users_of}
    tied = tuple(
        Tied(name, tuple(users), float(sizes[name].master))
        for name, users in users_of.items()
        if len(users) > 1 and sizes[name].trained
    )
    return Segments(count, _holdings(count, sizes, users_of), received, entering, crossings, tied, sizes)


def _users(uses: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """Name to the blocks that use it, from pairs in the order of blocks."""
    users: dict[str, list[int]] = {}
    for index, name in uses:
        users.setdefault(name, []).append(index)
    return users


def _add(array: Floats, users: Sequence[int], amount: float, first: int = 0) -> None:
    """Add `amount` to all runs [i, j] that start at block `first` or later and have one of `users` (sorted) in them."""
    for user in users:
        # Runs that start after the previous user and reach this one.
        array[first : user + 1, user:] += amount
        first = user + 1


def _crossings(graph: Graph) -> tuple[Crossing, ...]:
    made = {name: block.index for block in graph.blocks for name in block.outputs}
    found = []
    for value, users in _users((b.index, n) for b in graph.blocks for n in b.inputs).items():
        if value in made and value in graph.values:
            constant, per_sample = _linear(graph, value)
            needs_grad = graph.values[value].needs_grad
            found.append(Crossing(made[value], tuple(users), constant, per_sample, needs_grad))
    return tuple(found)


def _linear(graph: Graph, value: str) -> tuple[float, float]:
    one, two = (graph.values[value].bytes_at(n) for n in (1, 2))
    return float(2 * one - two), float(two - one)


class _Sums:
    """Sums of several amounts over parameters, for all runs of blocks: those used by one block, and by several."""

    def __init__(self, count: int, names: Sequence[str]) -> None:
        self.private = {name: np.zeros(count) for name in names}
        self.inner = {name: np.zeros((count, count)) for name in names}
        self.outer = {name: np.zeros((count, count)) for name in names}

    def add(self, users: Sequence[int], amounts: dict[str, float]) -> None:
        first, last = users[0], users[-1]
        for name, amount in amounts.items():
            if first == last:
                self.private[name][first] += amount
            else:
                self.inner[name][: first + 1, last:] += amount
                _add(self.outer[name], users, amount)
                self.outer[name][: first + 1, last:] -= amount

    def divided(self, name: str) -> Floats:
        """[i, j] of parameters that no block outside of the run uses."""
        return sums(self.private[name]) + self.inner[name]


_AMOUNTS = ("elements", "tensors", "master", "copy", "separate", "padding", "uses")


def _holdings(count: int, sizes: dict[str, ParameterSize], users_of: dict[str, list[int]]) -> Holdings:
    live, whole = _Sums(count, _AMOUNTS), _Sums(count, ("bytes",))
    largest, per_block = np.zeros(count), {"gradients": np.zeros(count), "copies": np.zeros(count)}
    inner_largest = np.zeros((count, count))
    owned_each = dict.fromkeys(SHARDS, 0.0)
    for name, users in users_of.items():
        size = sizes[name]
        if not size.trained:
            whole.add(users, {"bytes": size.whole})
            continue
        amounts = {"elements": size.elements, "tensors": 1, "master": size.master, "copy": size.copy}
        uses = size.copy * len(users)
        live.add(users, {**amounts, "separate": size.separate, "padding": size.padding, "uses": uses})
        if len(users) == 1:
            largest[users[0]] = max(largest[users[0]], size.elements)
        else:
            run = inner_largest[: users[0] + 1, users[-1] :]
            np.maximum(run, size.elements, out=run)
        for user in users:
            per_block["gradients"][user] += size.master
            per_block["copies"][user] += size.copy
        for shard in SHARDS:
            owned_each[shard] = max(owned_each[shard], owned(shard, size) / max(1, size.elements))
    master, copy, separate = (live.divided(n) for n in ("master", "copy", "separate"))
    untrained = whole.divided("bytes") + whole.outer["bytes"]
    whole_bytes = untrained + shared("none", live.outer["master"], live.outer["copy"], live.outer["separate"])
    whole_bytes += live.outer["padding"] + live.divided("padding")
    gradients, copies = maxima(per_block["gradients"]), pair_maxima(per_block["copies"])
    held = {s: whole_bytes + shared(s, master, copy, separate) + transient(s, gradients, copies) for s in SHARDS}
    return Holdings(
        whole_bytes=whole_bytes,
        whole_elements=live.outer["elements"],
        whole_tensors=live.outer["tensors"],
        tied_bytes=live.outer["master"],
        elements=live.divided("elements"),
        tensors=live.divided("tensors"),
        largest=np.maximum(maxima(largest), inner_largest),
        gradient_bytes=master,
        copy_bytes=copy,
        block_gradients=live.private["master"],
        block_copies=live.private["copy"],
        inner_gradients=live.inner["master"],
        inner_copies=live.inner["uses"],
        shared_bytes=held,
        owned_each=owned_each,
    )


def sums(values: Floats) -> Floats:
    """[i, j] sum of values i to j."""
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(prefix[None, 1:] - prefix[:-1, None])


def maxima(values: Floats) -> Floats:
    """[i, j] largest of values i to j."""
    upper = np.triu(np.broadcast_to(values, (len(values), len(values))))
    return np.asarray(np.maximum.accumulate(upper, axis=1))


def pair_maxima(values: Floats) -> Floats:
    """[i, j] largest sum of two neighbours within i to j, or the value itself where i equals j."""
    pairs = np.concatenate([[0.0], values[1:] + values[:-1]])
    grid = np.triu(np.broadcast_to(pairs, (len(values), len(values))), k=1)
    np.fill_diagonal(grid, values)
    return np.asarray(np.maximum.accumulate(grid, axis=1))
