"""Copy a graph with the tail before a loss on a fixed number of rows a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from ..blocks import block_of
from ..graph import Block, Graph, ValueSpec
from .per_sample import PerSample, spec
from .rows import Rows, is_view, only_picks

_aten = torch.ops.aten


@dataclass(frozen=True)
class Tail:
    """Operations that work on each row for itself, down to a loss that ignores rows."""

    loss: fx.Node
    target: fx.Node
    """Labels, of shape (samples * rows,), a value of the preamble."""
    ignored: int
    """The label of a row that has none."""
    rows: int
    """Rows of the loss for each sample."""
    nodes: Mapping[fx.Node, Rows]
    """The operations, but for the loss, to where the rows are in their results."""
    sources: Mapping[tuple[fx.Node, fx.Node], Rows]
    """(Operation of the tail or loss, input of it that has rows) to where the rows are in that input."""


def copy_on_rows(graph: Graph, block: Block, tail: Tail, capacity: int) -> Graph:
    """A copy of `graph` that computes `tail`, which lies in `block`, on ``samples * capacity`` rows.

    They are the rows with a label, of which there may not be more, and some that the loss ignores. Values outside the
    tail, and the names of all values that remain, are as in `graph`.
    """
    return _Copy(graph, block, tail, capacity).make()


class _Copy:
    def __init__(self, graph: Graph, block: Block, tail: Tail, capacity: int) -> None:
        self.graph, self.block, self.tail, self.capacity = graph, block, tail, capacity
        self.made = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.values = dict(graph.values)
        self.emitted = 0
        self.indices: dict[tuple[int, int], fx.Node] = {}
        self.picked: dict[tuple[fx.Node, Rows], fx.Node] = {}

    def make(self) -> Graph:
        nodes = list(self.graph.fx_graph.nodes)
        early = [n for n in nodes if n.op == "placeholder" or n.name in self.graph.preamble]
        for node in early:
            self.copy(node)
        labels = self.choose()
        chosen = {n.name for n in self.made.nodes} - {n.name for n in early}
        inside, own = set(self.block.nodes), []
        for node in nodes:
            before = len(self.made.nodes)
            if node in self.tail.nodes:
                self.convert(node)
            elif node is self.tail.loss:
                self.copy(node, lambda n: labels if n is self.tail.target else self.get(self.tail.loss, n))
            elif node not in self.copies:
                self.copy(node)
            if node.name in inside:
                own += list(self.made.nodes)[before:]
        result = replace(
            self.graph, fx_graph=self.made, values=self.values, preamble=self.graph.preamble | frozenset(chosen)
        )
        by_name = {n.name: n for n in own}
        outputs = [by_name[name] for name in self.block.outputs]
        changed = replace(block_of(result, self.block.index, own, outputs), name=self.block.name)
        return replace(result, blocks=tuple(changed if b is self.block else b for b in result.blocks))

    # -- which rows ----------------------------------------------------------------------------------------------

    def choose(self) -> fx.Node:
        """Compute which rows to take, labelled ones first and each kind in order; returns their labels."""
        tail, target = self.tail, self.copies[self.tail.target]
        labels = spec(tail.target)
        assert labels is not None
        whole = ValueSpec((tail.rows,), torch.int64, 0, tail.rows, False)
        part = replace(whole, shape=(self.capacity,), rows=self.capacity)
        kept = self.emit(_aten.ne.Scalar, (target, tail.ignored), replace(whole, dtype=torch.bool))
        kept = self.emit(_aten.to.dtype, (kept, torch.uint8), replace(whole, dtype=torch.uint8))
        order = self.emit(_aten.argsort.stable, (kept,), whole, stable=True, dim=0, descending=True)
        rows = self.emit(_aten.slice.Tensor, (order, 0, 0, PerSample(self.capacity)), part)
        for where in tail.sources.values():
            if (where.count, where.first) not in self.indices:
                self.indices[where.count, where.first] = self.shifted(rows, where, part)
        return self.emit(_aten.index_select.default, (target, 0, rows), replace(part, dtype=labels.dtype))

    def shifted(self, rows: fx.Node, where: Rows, part: ValueSpec) -> fx.Node:
        """The rows' numbers in a value of which the loss sees only some of each sample's rows."""
        if (where.count, where.first) == (self.tail.rows, 0):
            return rows
        sample = self.emit(_aten.div.Tensor_mode, (rows, self.tail.rows), part, rounding_mode="floor")
        skipped = self.emit(_aten.mul.Tensor, (sample, where.count - self.tail.rows), part)
        moved = self.emit(_aten.add.Tensor, (rows, skipped), part)
        return self.emit(_aten.add.Tensor, (moved, where.first), part)

    # -- the tail ------------------------------------------------------------------------------------------------

    def get(self, user: fx.Node, source: fx.Node) -> fx.Node:
        """What `user` takes in the place of `source`."""
        where = self.tail.sources.get((user, source))
        return self.copies[source] if where is None or source in self.tail.nodes else self.pick(source, where)

    def pick(self, source: fx.Node, where: Rows) -> fx.Node:
        """The chosen rows of a value from before the tail."""
        if (source, where) not in self.picked:
            own = spec(source)
            assert own is not None
            value, width = self.copies[source], own.shape[where.dims :]
            if where.dims > 1:
                flat = replace(own, shape=(where.count, *width), rows=where.count)
                value = self.emit(_aten.reshape.default, (value, [PerSample(where.count), *width]), flat, source)
            index = self.indices[where.count, where.first]
            chosen = self.on_rows(own, where.dims, dims=1)
            value = self.emit(_aten.index_select.default, (value, 0, index), chosen, source)
            self.picked[source, where] = self.shaped(value, source, where) if where.dims > 1 else value
        return self.picked[source, where]

    def convert(self, node: fx.Node) -> None:
        """Copy an operation of the tail."""
        where = self.tail.nodes[node]
        if only_picks(node, where):
            del self.values[node.name]
            self.copies[node] = self.get(node, node.all_input_nodes[0])
        elif is_view(node):
            self.copies[node] = self.shaped(self.get(node, node.all_input_nodes[0]), node, where, node.name)
        else:
            own = spec(node)
            assert own is not None
            made = self.copy(node, lambda n: self.get(node, n))
            self.note(made, self.on_rows(own, where.dims, where.dims))

    def shaped(self, value: fx.Node, like: fx.Node, where: Rows, name: str | None = None) -> fx.Node:
        """`value` with the dimensions of `like`: chosen rows, as if they were all of one sample, and their entries."""
        own = spec(like)
        assert own is not None
        lead = [1] * (where.dims - 1) + [PerSample(self.capacity)]
        shape = self.on_rows(own, where.dims, where.dims)
        return self.emit(_aten.reshape.default, (value, [*lead, *own.shape[where.dims :]]), shape, like, name)

    def on_rows(self, own: ValueSpec, of: int, dims: int) -> ValueSpec:
        """The spec of a value that has its rows in `of` dimensions, on the chosen rows in `dims` dimensions."""
        shape = (*[1] * (dims - 1), self.capacity, *own.shape[of:])
        return replace(own, shape=shape, batch_dim=dims - 1, rows=self.capacity)

    # -- nodes ---------------------------------------------------------------------------------------------------

    def copy(self, node: fx.Node, get: Any = None) -> fx.Node:
        made = self.made.node_copy(node, get or (lambda n: self.copies[n]))
        made.name = node.name
        self.copies[node] = made
        return made

    def emit(
        self,
        target: Any,
        args: Any,
        own: ValueSpec,
        like: fx.Node | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """A new operation; its gradient and its place in the model are those of `like`, or of the loss."""
        node = self.made.call_function(target, args, kwargs)
        node.name = name if name is not None else f"sparse_head_{self.emitted}"
        self.emitted += name is None
        at = like if like is not None else self.tail.loss
        node.meta = {k: v for k, v in at.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["needs_grad"] = like is not None and like.meta.get("needs_grad", False)
        self.note(node, own)
        return node

    def note(self, node: fx.Node, own: ValueSpec) -> None:
        node.meta["spec"] = own
        node.meta.pop("val", None)
        self.values[node.name] = own
