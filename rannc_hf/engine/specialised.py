"""Which captured graph a batch takes, where values of the batch decided what was captured (`Graph.guards`)."""

from __future__ import annotations

import logging
from collections.abc import Hashable

from rannc_hf.capture import Graph
from rannc_hf.capture.guards import Guards
from rannc_hf.engine.batch import GlobalBatch

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

    def key(self, shapes: Hashable, batch: GlobalBatch) -> Key:
        """The key of the graph that holds for a batch of these shapes; one that was not added where none does."""
        found = self._guards.get(shapes, [])
        for index, guards in enumerate(found):
            if guards is None or guards.hold(batch.fields):
                return shapes, index
        return shapes, len(found)

    def add(self, key: Key, graph: Graph) -> None:
        """A graph captured for a batch of `key`; nothing where it was added before."""
        shapes, index = key
        found = self._guards.setdefault(shapes, [])
        if index < len(found):
            return
        found.append(graph.guards)
        if len(found) == _MANY:
            logger.warning(
                "rannc: %d graphs were captured for batches of the same shapes, because the model reads values out of "
                "the batch (lately: %s); each takes seconds to capture, and memory. Let the collator pad or fix them",
                _MANY,
                str(graph.guards.values)[:80] if graph.guards is not None else "",
            )
