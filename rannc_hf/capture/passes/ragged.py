"""Refuse operations that are told where the rows of each sample begin or end: another sample may have more of them.

A part of the batch has an equal share of the rows of the batch. Lengths, offsets and boundaries of samples are numbers
that the graph does not know, and by which the rows may be shared out otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch.fx as fx

from ..errors import CaptureError, where
from .per_sample import batched, spec
from .schema import argument, name_of

_TOLD = {
    "aten.segment_reduce": ("lengths", "indices", "offsets"),
    "aten.repeat_interleave": ("repeats",),
    "aten._nested_view_from_buffer": ("nested_size",),
    "aten._pack_padded_sequence": ("lengths",),
    "aten._pad_packed_sequence": ("batch_sizes",),
}
"""Arguments that share out rows, by operation."""
_SORTED = {"aten.searchsorted": "sorted_sequence", "aten.bucketize": "boundaries"}
"""Arguments that are searched along their last dimension."""


def check_ragged(graph: fx.Graph, folded: Collection[fx.Node], local: Collection[fx.Node]) -> None:
    """Refuse what shares out rows by numbers in the batch; `folded` are inputs with several rows a sample.

    Raises:
        CaptureError: naming the operation and its module.
    """
    for node in graph.nodes:
        if folded and node.op == "call_function" and node not in local and any(_unequal(node, folded)):
            raise CaptureError(
                f"{node.target} in {where(node)} is told how many rows each sample has, by numbers in the batch, so a "
                "part of the batch may get rows of other samples: give all samples as many, and view rows as (samples, "
                "rows, ...)"
            )


def _unequal(node: fx.Node, folded: Collection[fx.Node]) -> Iterator[bool]:
    name = name_of(node)
    for told in _TOLD.get(name, ()):
        value: Any = argument(node, told)
        yield isinstance(value, fx.Node) and bool(batched(value))
    if name in _SORTED:
        value = argument(node, _SORTED[name])
        own = spec(value) if isinstance(value, fx.Node) else None
        yield own is not None and own.batch_dim is not None and own.batch_dim == len(own.shape) - 1
    if name == "aten.ctc_loss":
        # Targets one after the other. Those picked by a mask of as many entries a sample are equally many.
        value = argument(node, "targets")
        yield value.meta["val"].dim() == 1 and _comes_from(value, folded)


def _comes_from(node: fx.Node, sources: Collection[fx.Node]) -> bool:
    stack, seen = [node], set[fx.Node]()
    while stack:
        current = stack.pop()
        if current in sources:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False
