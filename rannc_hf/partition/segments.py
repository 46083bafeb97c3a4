"""What a stage of consecutive blocks holds and receives, for every first and last block at once.

Arrays are indexed [i, j]: blocks i to j inclusive; entries with j < i mean nothing. n is the number of blocks.
Sizes of values are linear in samples: `constant + per_sample * samples` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rannc_hf.capture.graph import Graph
from rannc_hf.cost.memory import parameter_bytes, state_bytes

Floats = npt.NDArray[np.float64]


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
class Segments:
    """Facts about all runs of blocks of a graph that depend on neither device nor batch."""

    count: int
    state_bytes: Floats
    """[i, j] bytes of masters, gradients, moments and copies of the parameters; a parameter used twice counts once."""
    gradient_bytes: Floats
    """[i, j] bytes that replicas of the stage reduce."""
    trained: Floats
    """[i, j] trained elements."""
    tensors: Floats
    """[i, j] trained parameters."""
    received: Linear
    """[i, j] values of earlier blocks, and values computed from the batch alone, that the run uses."""
    entering: Linear
    """[i], n + 1 entries: values that cross the boundary before block i."""
    crossings: tuple[Crossing, ...]


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
    return Segments(count, *_parameters(graph), received, entering, crossings)


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


def _parameters(graph: Graph) -> tuple[Floats, Floats, Floats, Floats]:
    """State bytes, gradient bytes, trained elements and trained parameters, each [i, j]."""
    count = len(graph.blocks)
    arrays = [np.zeros((count, count)) for _ in range(4)]
    for name, users in _users((b.index, n) for b in graph.blocks for n in b.parameters).items():
        spec = graph.parameters[name]
        item = max(4, parameter_bytes(graph, name) // max(1, spec.numel))
        trained = spec.numel if spec.trainable else 0
        for array, amount in zip(arrays, (state_bytes(graph, name), trained * item, trained, spec.trainable)):
            _add(array, users, float(amount))
    return arrays[0], arrays[1], arrays[2], arrays[3]
