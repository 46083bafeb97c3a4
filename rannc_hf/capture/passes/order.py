"""Follow the order of the samples through views, and what is picked by position.

A value has `outer * samples * inner` entries along its batch dimension. Samples are in order when a slice of the batch
gives a slice of each of the `outer` runs. Reshaping can break that: `x.view(length, samples, width)` of an x made as
(samples, length, width) puts parts of one sample where others are expected.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from ..errors import CaptureError, blamed, where
from ..graph import ValueSpec
from ..opaque.operation import is_opaque
from .per_sample import SAMPLES, PerSample, batched, spec
from .schema import FILLS, argument, is_random, name_of


@dataclass(frozen=True)
class _Position:
    """The entries are ``scale * i + offset`` for sample i, counted from the first: a slice of the batch begins at 0."""

    scale: int | None
    """None where they are something else made of i."""
    offset: bool = False
    """Whether anything is added."""


@dataclass(frozen=True)
class _Order:
    outer: int | None
    """How often the run of all samples is repeated along the batch dimension; None for what fits any order, such as
    zeros."""
    position: _Position | None = None


_ANY = _Order(None)
_PLAIN = _Order(1)


def check_order(graph: fx.Graph, preamble: set[fx.Node], local: Collection[fx.Node] = ()) -> None:
    """Refuse operations that put samples out of order, pick from other samples, or compute with a sample's position.

    Where the others' results have their samples is noted in ``meta["spec"]`` (`ValueSpec.runs`), and that it is known
    in ``meta["ordered"]``. Those in `local` see one slice alone, and may.

    Raises:
        CaptureError: naming the operation and its module.
    """
    orders: dict[fx.Node, _Order] = {}
    for node in graph.nodes:
        if not batched(node) or node in local:
            continue
        if node.op != "call_function":
            orders[node] = _PLAIN
            continue
        step = _Step(node, orders)
        orders[node] = step.order()
        if orders[node].position is not None and node not in preamble:
            raise step.refuse_position()
        own = spec(node)
        if own is not None:
            node.meta.update(spec=replace(own, runs=orders[node].outer or 1), ordered=True)


class _Step:
    """One operation with a batched result."""

    def __init__(self, node: fx.Node, orders: dict[fx.Node, _Order]) -> None:
        self.node, self.orders = node, orders
        self.sources = [n for n in node.all_input_nodes if n in orders]

    def order(self) -> _Order:
        name = name_of(self.node).removeprefix("aten.")
        if is_opaque(self.node):
            return self.opaque()
        if name_of(self.node) in FILLS or (is_random(self.node) and not self.sources):
            return _ANY
        if name == "arange":
            return self.counted()
        if name in _PICKS:
            return self.pick(*_PICKS[name](self.node))
        if not self.sources:
            return self.spread()
        rule = _RULES.get(name)
        return rule(self) if rule is not None else self.same(self.sources)

    def refuse(self, what: str) -> CaptureError:
        """What picks or reorders shows in numbers, which may prove that each sample only finds what is its own."""
        return CaptureError(
            f"{self.node.target} in {where(self.node)} {what}, so a part of the batch would give another result",
            blamed(self.node),
        )

    def refuse_position(self) -> CaptureError:
        """What is done from the hundredth sample on does not show in the few that a region is checked with."""
        refused = self.refuse("computes with the position of a sample in the batch")
        refused.module = None
        return refused

    def same(self, sources: list[fx.Node]) -> _Order:
        """The order that all `sources` agree on."""
        found = {self.orders[n].outer for n in sources} - {None}
        if len(found) > 1:
            raise self.refuse("combines values with their samples in different orders")
        return _Order(next(iter(found), None), self.moved(sources))

    def moved(self, sources: list[fx.Node]) -> _Position | None:
        """The position that entries hold, computed from that of the sources."""
        found = [p for n in sources if (p := self.orders[n].position) is not None]
        name, others = name_of(self.node), [a for a in self.node.args[:2] if a not in sources]
        if not found:
            return None
        if len(found) > 1 or found[0].scale is None:
            return _Position(None)
        if name == "aten.mul" and others and isinstance(others[0], int):
            return _Position(found[0].scale * others[0], found[0].offset)
        if name == "aten.add" or (name == "aten.sub" and self.node.args[0] in sources):
            return _Position(found[0].scale, found[0].offset or others != [0])
        return found[0] if name in _KEEP else _Position(None)

    @property
    def source(self) -> tuple[ValueSpec, _Order]:
        """The first argument, where that is batched."""
        own = spec(self.sources[0])
        assert own is not None and own.batch_dim is not None
        return own, self.orders[self.sources[0]]

    def with_outer(self, outer: int) -> _Order:
        return _Order(outer, self.source[1].position)

    def along_batch(self) -> bool:
        """Whether `dim` of the operation is the batch dimension of its first batched input."""
        own, _ = self.source
        dim: Any = argument(self.node, "dim", 0)
        return dim is not None and dim % len(own.shape) == own.batch_dim

    # -- rules ---------------------------------------------------------------------------------------------------

    def counted(self) -> _Order:
        """`arange` over the samples, or over the rows of all samples."""
        made = spec(self.node)
        assert made is not None
        step = argument(self.node, "step", 1) if argument(self.node, "start", 0) == 0 else None
        return _Order(1, _Position(step * made.rows if step is not None else None, made.rows > 1))

    def opaque(self) -> _Order:
        """Numbers have shown that the region treats each sample for itself, where it is given them in order."""
        for order in (self.orders[n] for n in self.sources):
            if order.position is not None:
                raise self.refuse_position()
            if order.outer not in (None, 1):
                raise self.refuse("combines values with their samples in different orders")
        return _PLAIN

    def spread(self) -> _Order:
        """A value that is the same for all samples, repeated for each."""
        shared = self.node.all_input_nodes
        if shared and all(math.prod(n.meta["val"].shape) == 1 for n in shared):
            return _ANY
        times: Any = argument(self.node, "repeats")
        if name_of(self.node) == "aten.repeat_interleave" and isinstance(times, PerSample):
            made = spec(self.node)
            assert made is not None
            return _Order(made.rows // times)
        return _PLAIN

    def view(self) -> _Order:
        own, order = self.source
        made = spec(self.node)
        assert made is not None and made.batch_dim is not None
        if order.outer is None:
            return order
        before = math.prod(own.shape[: own.batch_dim]) * order.outer
        outer, rest = divmod(before, math.prod(made.shape[: made.batch_dim]))
        if rest or made.rows % max(outer, 1) or not outer:
            raise self.refuse("puts the samples of a batch out of order")
        return self.with_outer(outer)

    def repeat(self) -> _Order:
        own, order = self.source
        counts: Any = argument(self.node, "repeats") or argument(self.node, "dims")
        assert own.batch_dim is not None
        from_end = len(own.shape) - own.batch_dim
        times = counts[-from_end] if from_end <= len(counts) else 1
        return order if order.outer is None else self.with_outer(order.outer * times)

    def cat(self) -> _Order:
        if not self.along_batch():
            return self.same(self.sources)
        inner = {_inner(n, self.orders[n]) for n in self.sources} - {None}
        if len(inner) > 1:
            raise self.refuse("combines values with their samples in different orders")
        made = spec(self.node)
        assert made is not None
        return self.with_outer(made.rows // next(iter(inner))) if inner else _ANY  # type: ignore[operator]

    def part(self) -> _Order:
        """`slice`, `narrow`, `split`: parts of the batch dimension must be whole runs of all samples."""
        own, order = self.source
        if not self.along_batch() or order.outer is None:
            return order
        inner = own.rows // order.outer
        whole = [*self.bounds(own)]
        if any(not isinstance(b, PerSample) or b % inner for b in whole):
            raise self.refuse("takes some of the samples of a batch")
        made = spec(self.node)
        # The parts of a tuple get theirs in `item`.
        return self.with_outer(made.rows // inner if made is not None else order.outer)

    def write(self) -> _Order:
        """`slice_scatter`, `select_scatter`: only all samples alike can be written to."""
        own, order = self.source
        changed = name_of(self.node) == "aten.select_scatter" or self.bounds(own) != [PerSample(0), PerSample(own.rows)]
        if self.along_batch() and changed:
            raise self.refuse("writes to some of the samples of a batch")
        return self.same(self.sources) if not self.along_batch() else order

    def bounds(self, own: ValueSpec) -> list[Any]:
        """Where the parts begin and end, as multiples of the number of samples where they are that."""
        name = name_of(self.node)
        values = self.node.meta["val"]
        if name not in ("aten.slice", "aten.narrow", "aten.slice_scatter"):
            sizes = [v.shape[own.batch_dim] for v in values]
            return [PerSample(n // SAMPLES[0]) if n % SAMPLES[0] == 0 else n for n in sizes]
        start: Any = argument(self.node, "start") or PerSample(0)
        if name == "aten.narrow":
            return [start, argument(self.node, "length")]
        end: Any = argument(self.node, "end")
        if argument(self.node, "step") != 1:
            return [None]
        open_end = end is None or (not isinstance(end, PerSample) and end >= 2**31)
        return [start, PerSample(own.rows) if open_end else end]

    def item(self) -> _Order:
        """One of several results."""
        source = self.sources[0]
        made, order = spec(self.node), self.orders[source]
        if made is None or order.outer is None or name_of(source) not in _SPLITS or not source.all_input_nodes:
            return order
        step = _Step(source, self.orders)
        own, before = step.source
        if not step.along_batch() or before.outer is None:
            return order
        return _Order(made.rows // (own.rows // before.outer), order.position)

    def flattened(self) -> _Order:
        own, order = self.source
        if argument(self.node, "dim") is not None or order.outer is None:
            return order
        return self.with_outer(order.outer * math.prod(own.shape[: own.batch_dim]))

    def strided(self) -> _Order:
        """`as_strided` sees memory: the samples must be outermost in it, before and after."""
        own, _ = self.source
        value = self.sources[0].meta["val"]
        strides: Any = argument(self.node, "stride")
        made = spec(self.node)
        assert made is not None
        outermost = own.batch_dim == made.batch_dim == 0 and own.rows == made.rows == 1
        if not (outermost and value.is_contiguous() and strides[0] == value.stride(0)):
            raise self.refuse("reads memory across the samples of a batch")
        return _PLAIN

    def pick(self, table: fx.Node, dim: int | None, index: fx.Node | None) -> _Order:
        """Entries of `table` chosen along `dim` by the numbers in `index`."""
        chosen = self.orders.get(index) if index is not None else None
        # Where bags begin in the list of all their entries is counted from the first sample, and used as such.
        begins = argument(self.node, "offsets")
        others = [n for n in self.sources if n is not index and n is not begins]
        if begins in self.orders:
            rows = spec(index) if index is not None else None
            own_begin = rows is not None and self.orders[begins].position == _Position(rows.rows)
            if not own_begin:
                raise self.refuse("is told by the batch where the entries of each sample begin")
        own = spec(table)
        assert own is not None
        if table in self.orders and own.batch_dim == dim:
            # Only a sample's own position finds the sample itself, in a part of the batch too: i, or, where a sample
            # has several rows, the first of its rows plus one of them.
            own_position = chosen is not None and chosen.position in (
                _Position(own.rows),
                _Position(own.rows, own.rows > 1),
            )
            if not own_position or self.orders[table].outer not in (None, 1):
                raise self.refuse("picks from the other samples of a batch")
            return _PLAIN
        if chosen is not None and chosen.position is not None:
            raise self.refuse_position()
        return self.same(others + ([index] if index is not None and chosen is not None else []))


def _inner(node: fx.Node, order: _Order) -> int | None:
    own = spec(node)
    assert own is not None
    return None if order.outer is None else own.rows // order.outer


_KEEP = {
    f"aten.{name}"
    for name in ("view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "to", "_to_copy", "clone", "alias",
                 "contiguous", "transpose", "permute", "detach")
}  # fmt: skip
"""Operations that change nothing about the numbers."""
_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
_RULES: dict[str, Callable[[_Step], _Order]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"),
                    _Step.view),
    **dict.fromkeys(("repeat", "tile"), _Step.repeat),
    **dict.fromkeys(("cat", "concat", "concatenate"), _Step.cat),
    **dict.fromkeys(("slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split"), _Step.part),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _Step.write),
    "repeat_interleave": _Step.flattened,
    "as_strided": _Step.strided,
    operator.getitem.__name__: _Step.item,
}  # fmt: skip


# -- operations that pick entries by number: (table, dimension, index) -----------------------------------------------


def _along_dim(node: fx.Node) -> tuple[fx.Node, int | None, fx.Node]:
    table: Any = node.args[0]
    dim: Any = argument(node, "dim")
    index: Any = argument(node, "index", argument(node, "indices"))
    return table, dim % table.meta["val"].dim() if dim is not None else spec(table).batch_dim, index  # type: ignore[union-attr]


def _indexed(node: fx.Node) -> tuple[fx.Node, int | None, fx.Node | None]:
    table: Any = node.args[0]
    indices: Any = argument(node, "indices")
    own = spec(table)
    assert own is not None
    if own.batch_dim is not None:
        picked = indices[own.batch_dim] if own.batch_dim < len(indices) else None
        return table, own.batch_dim if picked is not None else None, picked
    counted = [i for i in indices if i is not None and batched(i)]
    return table, None, counted[0] if counted else None


def _embedded(node: fx.Node) -> tuple[fx.Node, int | None, fx.Node]:
    return node.args[0], 0, node.args[1]  # type: ignore[return-value]


_PICKS: dict[str, Callable[[fx.Node], tuple[fx.Node, int | None, fx.Node | None]]] = {
    **dict.fromkeys(("gather", "index_select", "take_along_dim", "take", "index_add", "index_copy", "index_fill",
                     "scatter", "scatter_add", "scatter_reduce"), _along_dim),
    **dict.fromkeys(("index", "index_put", "_unsafe_index"), _indexed),
    **dict.fromkeys(("embedding", "embedding_bag"), _embedded),
}  # fmt: skip
