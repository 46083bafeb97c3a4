"""Which captured graph a batch takes, where values of the batch decided what was captured (`Graph.guards`)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, MutableMapping
from typing import Any

import torch

from rannc_hf.capture import Graph
from rannc_hf.capture.guards import Guards
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.runtime import describe_shapes

logger = logging.getLogger(__name__)
_MANY = 8
"""Graphs of the same shapes from which on it is worth a word."""
_MOST_STATES = 16
"""States of the model whose graphs are kept, beside the first."""
Key = tuple[tuple[Hashable, ...], int]


class Specialised:
    """Graphs of equal shapes, told apart by what the model reads out of the batch.

    Every rank has the whole batch, so all of them find the same.
    """

    def __init__(self) -> None:
        self._guards: dict[tuple[Hashable, ...], list[Guards | None]] = {}
        self._states: dict[str, None] = {}
        """The one that was used last is the last."""

    def key(self, training: bool, batch: GlobalBatch, state: str) -> Key:
        """The key of the graph that holds for a batch; one that was not added where none does.

        state: what the model is like, beside its parameters (`engine.watched`).
        """
        if state:
            self._states.pop(state, None)
            self._states[state] = None
        shapes = (state, training, training or torch.is_grad_enabled(), describe_shapes(batch))
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

    def forget(self, kept: MutableMapping[Key, Any]) -> None:
        """Drop what is kept for the state of the model that was not used for longest, where there are many.

        A script that sets another number at every step would fill the memory.
        """
        if len(self._states) > _MOST_STATES:
            oldest = next(iter(self._states))
            del self._states[oldest]
            self._guards = {shapes: guards for shapes, guards in self._guards.items() if shapes[0] != oldest}
            for key in [key for key in kept if key[0][0] == oldest]:
                del kept[key]
