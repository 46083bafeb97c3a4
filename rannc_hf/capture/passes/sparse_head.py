"""The head of a model on the labelled rows only.

Where a loss ignores most positions (15 % of the tokens have a label in masked language modelling; the prompts of a
causal model have none), everything from the last operation that mixes positions to the loss is computed for nothing on
the other rows: the transform, the projection to the vocabulary, the loss. A variant of the graph picks the labelled
rows first. It is exact: ignored rows add nothing to the loss or to any gradient.

Shapes must not depend on the labels, so a variant has room for a fixed number of rows a sample, and what is left over
is filled with rows that the loss ignores. There is a variant for every sixteenth of the rows, made when a step first
needs it. The random numbers of a dropout in the head differ from those of the whole graph; their distribution does not.

The rows are picked inside the block that computes the loss: no value between blocks or stages changes, so each replica
takes the variant that its own slice of a microbatch needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from ..graph import Block, Graph
from .per_sample import spec
from .rows import Rows, row_sources
from .schema import argument, name_of
from .sparse_copy import Tail, copy_on_rows

_LOSSES = ("aten.cross_entropy_loss", "aten.nll_loss_nd", "aten.nll_loss")
_SUM = 2
_PARTS = 16
"""Variants have a multiple of this part of the rows: few functions serve all batches."""
_MOST = 0.7
"""The largest share of the rows that is picked."""


@dataclass(frozen=True)
class SparseHead:
    """The part of a graph that can run on the labelled rows only."""

    graph: Graph
    block: Block
    """The block it lies in."""
    tail: Tail
    _variants: dict[int, Graph] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The preamble value that holds the labels."""
        return self.tail.target.name

    @property
    def rows(self) -> int:
        """Rows a sample, with or without a label."""
        return self.tail.rows

    def labelled(self, target: torch.Tensor) -> torch.Tensor:
        """How many rows have a label; `target` is the value of that name. An int64 scalar on its device."""
        return (target != self.tail.ignored).sum()

    def labelled_by_sample(self, target: torch.Tensor) -> torch.Tensor:
        """How many rows of each sample have a label, [samples]."""
        return (target != self.tail.ignored).reshape(-1, self.rows).sum(1)

    def capacity(self, labelled: int, samples: int) -> int | None:
        """Rows a sample that a variant needs for `labelled` rows in `samples` samples; None where all rows are best."""
        part = -(-self.tail.rows // _PARTS)
        needed = max(-(-labelled // (samples * part)), 1) * part
        return needed if needed <= _MOST * self.tail.rows else None

    def variant(self, capacity: int) -> Graph:
        """The graph for slices in which at most ``samples * capacity`` rows have a label."""
        if capacity not in self._variants:
            self._variants[capacity] = copy_on_rows(self.graph, self.block, self.tail, capacity)
        return self._variants[capacity]


def sparse_head(graph: Graph) -> SparseHead | None:
    """The head of a training graph that can run on the labelled rows only; None where there is none.

    A graph with several losses over rows has it for the one with the widest rows. The tail ends before a value that
    something else needs too, and at the beginning of the block.
    """
    if not graph.training:
        return None
    by_name = {n.name: n for n in graph.fx_graph.nodes}
    heads = [
        head
        for block in graph.blocks
        for name in block.nodes
        if name_of(by_name[name]) in _LOSSES and (head := _head(graph, block, by_name[name], by_name)) is not None
    ]
    return max(heads, key=lambda h: h.tail.rows * _widest(h.tail.nodes), default=None)


def _head(graph: Graph, block: Block, loss: fx.Node, by_name: Mapping[str, fx.Node]) -> SparseHead | None:
    scores, target = loss.args[0], loss.args[1]
    assert isinstance(scores, fx.Node) and isinstance(target, fx.Node)
    own, labels = spec(scores), spec(target)
    if own is None or labels is None or argument(loss, "reduction") != _SUM or target.name not in graph.preamble:
        return None
    if labels.dtype.is_floating_point or len(labels.shape) != 1 or len(own.shape) != 2:
        return None
    if own.batch_dim != 0 or labels.batch_dim != 0 or own.rows != labels.rows or own.rows == 1:
        return None
    nodes = [by_name[n] for n in block.nodes]
    outputs = {by_name[n] for n in block.outputs}
    tail, sources = _tail(loss, Rows(own.rows), nodes[: nodes.index(loss)], outputs)
    entered = {source: rows for (_, source), rows in sources.items() if source not in tail}
    # Picking rows costs as much as the rows picked are wide; what it saves must be more.
    if _widest(tail) <= sum(rows.width(s) for n, rows in entered.items() if (s := spec(n)) is not None):
        return None
    return SparseHead(graph, block, Tail(loss, target, argument(loss, "ignore_index"), own.rows, tail, sources))


def _tail(
    loss: fx.Node, rows: Rows, before: Sequence[fx.Node], outputs: set[fx.Node]
) -> tuple[dict[fx.Node, Rows], dict[tuple[fx.Node, fx.Node], Rows]]:
    """The operations among `before` that only work towards the rows of `loss`, and where they get rows from."""
    tail: dict[fx.Node, Rows] = {}
    scores = loss.args[0]
    assert isinstance(scores, fx.Node)
    sources = {(loss, scores): rows}
    for node in reversed(before):
        wanted = {sources.get((user, node)) for user in node.users}
        found = next(iter(wanted)) if len(wanted) == 1 and node not in outputs else None
        inputs = row_sources(node, found) if found is not None else None
        if found is not None and inputs:
            tail[node] = found
            sources.update({(node, source): where for source, where in inputs.items()})
    return tail, sources


def _widest(tail: Mapping[fx.Node, Rows]) -> int:
    return max((rows.width(s) for n, rows in tail.items() if (s := spec(n)) is not None), default=0)
