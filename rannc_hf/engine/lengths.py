"""Outputs of padded batches, cut back to the lengths this rank passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.watch import Losses
from rannc_hf.engine.batch import GlobalBatch


class Lengths:
    """Knows which dimensions of which outputs grow with which dimension of the batch.

    It is found by capturing the step once more with another length, once for each set of fields.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, dtype
        self._cache: dict[Any, dict[str, dict[int, int]]] = {}

    def unpad(self, outputs: Mapping[str, torch.Tensor], batch: GlobalBatch, graph: Graph) -> dict[str, torch.Tensor]:
        """`outputs` without the entries that padding added."""
        result = {}
        for path, value in outputs.items():
            for (field, dim), surplus in _groups(batch).items():
                for axis, growth in self._growth(batch, graph, field, dim).get(path, {}).items():
                    value = value.narrow(axis, 0, value.shape[axis] - growth * surplus)
            result[path] = value
        return result

    def _growth(self, batch: GlobalBatch, graph: Graph, field: str, dim: int) -> dict[str, dict[int, int]]:
        """For each output, its dimensions that grow with dimension `dim` of `field`, and by how much."""
        key = (graph.training, tuple(sorted(batch.fields)), field, dim)
        if key not in self._cache:
            length = batch.fields[field].shape[dim]
            shorter = length - max(1, length // 2) if length > 1 else 2
            padded = batch.batched - batch.folded
            alike = [f for f in padded if batch.fields[f].dim() > dim and batch.fields[f].shape[dim] == length]
            fields = dict(batch.fields)
            for name in alike:
                # Real values: the model may read them.
                fields[name] = torch.cat([fields[name]] * 2, dim).narrow(dim, 0, shorter)
            losses: Losses = "split" if graph.split else "fused"
            other = capture(
                self._model, fields, dtype=self._dtype, training=graph.training, loss=losses, folded=batch.folded
            )
            self._cache[key] = {
                path: _differences(graph, other, path, length - shorter)
                for path in graph.outputs
                if path in other.outputs
            }
        return self._cache[key]


def _groups(batch: GlobalBatch) -> dict[tuple[str, int], int]:
    """One representative for fields of equal length that were padded together."""
    groups: dict[tuple[int, int], tuple[tuple[str, int], int]] = {}
    for (field, dim), surplus in sorted(batch.surplus.items()):
        groups.setdefault((dim, batch.fields[field].shape[dim]), ((field, dim), surplus))
    return dict(groups.values())


def _differences(graph: Graph, other: Graph, path: str, steps: int) -> dict[int, int]:
    here, there = graph.values[graph.outputs[path]], other.values[other.outputs[path]]
    return {
        d: (a - b) // steps for d, (a, b) in enumerate(zip(here.at(1), there.at(1))) if a != b and d != here.batch_dim
    }
