"""Which operations work on each row of a value (each token) for itself, and where the rows come from.

Used to follow rows backwards from a loss (`sparse_head`). Only operations listed here, and those that PyTorch tags as
pointwise, are taken to keep rows apart: an operation that is not known ends the search, and nothing is lost but speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..graph import ValueSpec
from .per_sample import spec
from .schema import argument, name_of


@dataclass(frozen=True)
class Rows:
    """Where the rows of a loss are in a value.

    The first `dims` dimensions of the value, (samples * count,) or (samples, count), are its rows, in order. Row i of
    the loss is the value's row ``first + i``, for each sample.
    """

    count: int
    first: int = 0
    dims: int = 1

    def width(self, own: ValueSpec) -> int:
        """Entries of a row."""
        return math.prod(own.shape[self.dims :])


def row_sources(node: fx.Node, rows: Rows) -> dict[fx.Node, Rows] | None:
    """The inputs of `node` that have its rows, and where; None where a row depends on more than its own row of them.

    The operation's other inputs (weights) are the same for all rows. Given just some of the rows of its sources, the
    operation computes the same rows of its result.
    """
    own = spec(node)
    if own is None or node.op != "call_function":
        return None
    short = name_of(node).removeprefix("aten.")
    rule = _RULES.get(short)
    if rule is not None:
        return rule(node, rows)
    if short in _EACH_ENTRY or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(node, rows)
    return None


def is_view(node: fx.Node) -> bool:
    """Whether the operation changes nothing but the shape, which must be another one for another number of rows."""
    return name_of(node).removeprefix("aten.") in _VIEWS


def only_picks(node: fx.Node, rows: Rows) -> bool:
    """Whether the operation only leaves rows out (or nothing): where rows have been picked there is nothing to do."""
    if name_of(node) != "aten.slice":
        return False
    dim = _slice_dim(node)
    return _spec_of_first(node) == spec(node) or (dim is not None and dim < rows.dims)


# -- rules -----------------------------------------------------------------------------------------------------------

_Found = dict[fx.Node, Rows] | None


def _pointwise(node: fx.Node, rows: Rows) -> _Found:
    own = spec(node)
    assert own is not None
    found: dict[fx.Node, Rows] = {}
    for source in node.all_input_nodes:
        other = spec(source)
        if other is None:
            return None
        missing = len(own.shape) - len(other.shape)
        if other.batch_dim is not None:
            if missing or other.batch_dim != own.batch_dim or other.shape[: rows.dims] != own.shape[: rows.dims]:
                return None
            found[source] = rows
        elif any(n != 1 for n in other.shape[: max(rows.dims - missing, 0)]):
            # A value for each position, such as a position embedding: it would have to be picked too.
            return None
    return found


def _reshaped(node: fx.Node, rows: Rows) -> _Found:
    """Entries keep their order, so the first dimensions are the rows wherever there are as many of them."""
    source = node.all_input_nodes[0]
    other = spec(source)
    if len(node.all_input_nodes) > 1 or other is None or other.batch_dim != 0:
        return None
    if other.rows == rows.count:
        return {source: Rows(rows.count, rows.first, 1)}
    if other.rows == 1 and other.shape[1:2] == (rows.count,):
        return {source: Rows(rows.count, rows.first, 2)}
    return None


def _matrix(position: int) -> Callable[[fx.Node, Rows], _Found]:
    """A product of the input at `position`, whose rows these are, and a weight."""

    def rule(node: fx.Node, rows: Rows) -> _Found:
        source: Any = node.args[position]
        other = spec(source)
        assert other is not None
        weights = [w for n in node.all_input_nodes if n is not source and (w := spec(n)) is not None]
        shared = all(w.batch_dim is None for w in weights) and len(weights) == len(node.all_input_nodes) - 1
        # A product with a stack of matrices may have one for each sample; a bias with two dimensions, one a row.
        flat = all(len(w.shape) <= 2 for w in weights) and (position == 0 or weights[0].shape[:-1] in ((), (1,)))
        return {source: rows} if shared and flat and len(other.shape) > rows.dims else None

    return rule


def _along(names: tuple[str, ...]) -> Callable[[fx.Node, Rows], _Found]:
    """Works along the dimensions that the first of the arguments `names` gives, which may not be those of rows."""

    def rule(node: fx.Node, rows: Rows) -> _Found:
        source: Any = node.args[0]
        other = spec(source)
        given = next((v for name in names if (v := argument(node, name)) is not None), None)
        if other is None or other.batch_dim is None or given is None or given == [] or len(node.all_input_nodes) > 1:
            return None
        dims = [given] if isinstance(given, int) else given
        return {source: rows} if all(d % len(other.shape) >= rows.dims for d in dims) else None

    return rule


def _normalized(node: fx.Node, rows: Rows) -> _Found:
    source: Any = node.args[0]
    other = spec(source)
    weights = [spec(n) for n in node.all_input_nodes if n is not source]
    if other is None or any(w is None or w.batch_dim is not None for w in weights):
        return None
    shape: Any = argument(node, "normalized_shape")
    return {source: rows} if len(shape) <= len(other.shape) - rows.dims else None


def _permuted(node: fx.Node, rows: Rows) -> _Found:
    source: Any = node.args[0]
    other = spec(source)
    assert other is not None
    rank = len(other.shape)
    if name_of(node) == "aten.permute":
        order: Any = argument(node, "dims")
        return {source: rows} if [d % rank for d in order[: rows.dims]] == list(range(rows.dims)) else None
    moved = (argument(node, "dim0") % rank, argument(node, "dim1") % rank)
    return {source: rows} if min(moved) >= rows.dims else None


def _sliced(node: fx.Node, rows: Rows) -> _Found:
    """Parts of a row's entries, or, as where a loss compares with the next token, some of each sample's rows."""
    source: Any = node.args[0]
    other, dim = _spec_of_first(node), _slice_dim(node)
    if other is None or other == spec(node) or (dim is not None and dim >= rows.dims):
        return {source: rows}
    start: Any = argument(node, "start") or 0
    if dim != 1 or argument(node, "step") != 1 or other.batch_dim != 0 or other.rows != 1:
        return None
    count = other.shape[1]
    first = start + count if start < 0 else start
    return {source: Rows(count, rows.first + first, 2)} if 0 <= first <= count - rows.count else None


def _slice_dim(node: fx.Node) -> int | None:
    other = _spec_of_first(node)
    dim: Any = argument(node, "dim")
    return dim % len(other.shape) if other is not None else None


def _spec_of_first(node: fx.Node) -> ValueSpec | None:
    source = node.args[0]
    return spec(source) if isinstance(source, fx.Node) else None


_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
_EACH_ENTRY = ("to", "_to_copy", "type_as", "alias", "contiguous", "detach", "dropout")
"""Pointwise operations without the tag. Dropout draws other numbers for fewer rows, of the same distribution."""
_RULES: dict[str, Callable[[fx.Node, Rows], _Found]] = {
    **dict.fromkeys(_VIEWS, _reshaped),
    **dict.fromkeys(("linear", "matmul", "mm"), _matrix(0)),
    "addmm": _matrix(1),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    **dict.fromkeys(
        ("mean", "sum", "var", "std", "amax", "amin", "softmax", "_softmax", "log_softmax", "_log_softmax",
         "logsumexp", "linalg_vector_norm"), _along(("dim",)),
    ),
    **dict.fromkeys(("transpose", "permute"), _permuted),
    "slice": _sliced,
}  # fmt: skip
