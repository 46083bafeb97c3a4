"""Outputs of padded batches, cut back to the lengths this rank passed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.watch import Losses
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.outputs import own_output


class Lengths:
    """Knows which dimensions of which outputs grow with which dimension of the batch.

    It is found by capturing the step once more with another length, once for each set of arguments.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, dtype
        self._cache: dict[Any, dict[str, dict[int, int]]] = {}

    def returned(self, outputs: Mapping[str, torch.Tensor], batch: GlobalBatch, graph: Graph) -> Any:
        """What the model returns on this rank, as it would have for the rank's own samples."""
        return own_output(graph, self.unpad(outputs, batch, graph), padded=bool(batch.surplus))

    def unpad(self, outputs: Mapping[str, torch.Tensor], batch: GlobalBatch, graph: Graph) -> dict[str, torch.Tensor]:
        """`outputs` without the entries that padding added."""
        result = dict(outputs)
        for (dim, own, common), fields in _together(batch).items():
            growth = self._growth(batch, graph, fields, dim)
            for path, value in result.items():
                for axis, factor in growth.get(path, {}).items():
                    value = value.narrow(axis, 0, value.shape[axis] - factor * (common - own))
                result[path] = value
        return result

    def _growth(self, batch: GlobalBatch, graph: Graph, fields: Collection[str], dim: int) -> dict[str, dict[int, int]]:
        """For each output, its dimensions that grow with dimension `dim` of `fields`, and by how much."""
        key = (graph.training, *_kind(batch, graph), tuple(sorted(fields)), dim)
        if key not in self._cache:
            length = next(batch.fields[name].shape[dim] for name in fields)
            shorter = length - max(1, length // 2) if length > 1 else 2
            # Real values: the model may read them.
            made = {name: torch.cat([batch.fields[name]] * 2, dim).narrow(dim, 0, shorter) for name in fields}
            losses: Losses = "split" if graph.split else "fused"
            changed = {**batch.fields, **made}
            other = capture(
                self._model, changed, dtype=self._dtype, training=graph.training, loss=losses, folded=batch.folded
            )
            shared = graph.outputs.keys() & other.outputs.keys()
            self._cache[key] = {path: _differences(graph, other, path, length - shorter) for path in shared}
        return self._cache[key]


def _together(batch: GlobalBatch) -> dict[tuple[int, int, int], list[str]]:
    """Fields that were as long in a dimension, and padded as far: (dimension, length, padded length) to their names."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for (name, dim), surplus in batch.surplus.items():
        common = batch.fields[name].shape[dim]
        found.setdefault((dim, common - surplus, common), []).append(name)
    return found


def _kind(batch: GlobalBatch, graph: Graph) -> tuple[object, ...]:
    """What decides which outputs there are, and how they grow: not lengths, but arguments, and values read."""
    read = None if graph.guards is None else repr(graph.guards.values)
    return tuple(sorted(batch.fields)), batch.plain, tuple(graph.outputs), read


def _differences(graph: Graph, other: Graph, path: str, steps: int) -> dict[int, int]:
    here, there = graph.values[graph.outputs[path]], other.values[other.outputs[path]]
    return {
        d: (a - b) // steps for d, (a, b) in enumerate(zip(here.at(1), there.at(1))) if a != b and d != here.batch_dim
    }
