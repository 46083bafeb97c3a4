"""Which captured graph a batch takes, where values of the batch decided what was captured (`Graph.guards`)."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch

from rannc_hf.capture import Graph
from rannc_hf.capture.guards import Guards
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.runtime import describe_shapes

logger = logging.getLogger(__name__)
_MANY = 8
"""Graphs of the same shapes from which on it is worth a word."""
Key = tuple[Hashable, int]


class Specialised:
    """Graphs of equal shapes, told apart by what the model reads out of the batch.

    Every rank has the whole batch, so all of them find the same.
    """

    def __init__(self) -> None:
        self._guards: dict[Hashable, list[Guards | None]] = {}

    def key(self, training: bool, batch: GlobalBatch) -> Key:
        """The key of the graph that holds for a batch; one that was not added where none does."""
        shapes = (training, training or torch.is_grad_enabled(), describe_shapes(batch))
        found = self._guards.get(shapes, [])
        for index, guards in enumerate(found):
            if guards is None or guards.hold(batch.fields):
                return shapes, index
        return shapes, len(found)

    def add(self, key: Key, graph: Graph) -> Key:
        """Add a graph captured for a batch of `key`, which is returned; nothing where it was added before."""
        shapes, index = key
        found = self._guards.setdefault(shapes, [])
        if index < len(found):
            return key
        found.append(graph.guards)
        if len(found) == _MANY:
            logger.warning(
                "rannc: %d graphs were captured for batches of the same shapes, because the model reads values out of "
                "the batch (lately: %s); each takes seconds to capture, and memory. Let the collator pad or fix them",
                _MANY,
                str(graph.guards.values)[:80] if graph.guards is not None else "",
            )
        return key
