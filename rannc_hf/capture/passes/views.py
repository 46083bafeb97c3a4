"""Write a new value of a view back into the tensor it views."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from ..errors import CaptureError, where
from .schema import argument, name_of

_aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""Makes a node from (target, args)."""

_RESHAPES = {
    f"aten.{name}"
    for name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
                 "_unsafe_view", "atleast_1d", "atleast_2d", "ravel")
}  # fmt: skip


def scatter(view: fx.Node, source: fx.Node, value: fx.Node, emit: Emit) -> fx.Node:
    """`source` with the part that `view` shows replaced by `value`.

    `view` is an operation on `source`, or one of the results (`getitem`) of an operation on it.

    Raises:
        CaptureError: for views that cannot be written back.
    """
    if view.target is operator.getitem:
        return _scatter_part(view, source, value, emit)
    shape, dtype = source.meta["val"].shape, source.meta["val"].dtype
    if view.meta["val"].dtype != dtype:
        raise _refuse(view)
    name = name_of(view)
    if name in _RESHAPES:
        return emit(_aten.reshape.default, (value, list(shape)))
    if name in _INVERSES:
        return emit(*_INVERSES[name](view, source, value))
    if name in _SAME and view.meta["val"].shape == shape:
        return value
    raise _refuse(view)


def _scatter_part(view: fx.Node, source: fx.Node, value: fx.Node, emit: Emit) -> fx.Node:
    """For views that come several at a time: `split`, `chunk`, `unbind`."""
    whole, index = view.args
    assert isinstance(whole, fx.Node) and isinstance(index, int)
    dim = argument(whole, "dim", 0)
    if name_of(whole) == "aten.unbind":
        return emit(_aten.select_scatter.default, (source, value, dim, index))
    if name_of(whole) not in ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_chunk"):
        raise _refuse(whole)
    sizes = [part.shape[dim] for part in whole.meta["val"]]
    start = sum(sizes[:index])
    return emit(_aten.slice_scatter.default, (source, value, dim, start, start + sizes[index]))


def _refuse(view: fx.Node) -> CaptureError:
    return CaptureError(
        f"the forward writes to the result of {view.target} in {where(view)}, which is a view that cannot be written "
        "back: write to a copy (`.clone()`) or use an operation that is not in place"
    )


def _inverse_permutation(dims: Any) -> list[int]:
    order = [d % len(dims) for d in dims]
    return [order.index(d) for d in range(len(order))]


_SAME = ("aten.alias", "aten.detach", "aten.to", "aten.contiguous", "aten.type_as", "aten.expand",
         "aten._to_copy", "aten.expand_as", "aten.lift_fresh")  # fmt: skip

_INVERSES: dict[str, Callable[[fx.Node, fx.Node, fx.Node], tuple[Any, tuple[Any, ...]]]] = {
    "aten.slice": lambda v, s, x: (_aten.slice_scatter.default, (s, x, *v.args[1:])),
    "aten.narrow": lambda v, s, x: (
        _aten.slice_scatter.default,
        (s, x, v.args[1], v.args[2], v.args[2] + v.args[3]),  # type: ignore[operator]
    ),
    "aten.select": lambda v, s, x: (_aten.select_scatter.default, (s, x, *v.args[1:])),
    "aten.diagonal": lambda v, s, x: (_aten.diagonal_scatter.default, (s, x, *v.args[1:])),
    "aten.transpose": lambda v, s, x: (_aten.transpose.int, (x, *v.args[1:])),
    "aten.swapaxes": lambda v, s, x: (_aten.transpose.int, (x, *v.args[1:])),
    "aten.t": lambda v, s, x: (_aten.t.default, (x,)),
    "aten.mT": lambda v, s, x: (_aten.transpose.int, (x, -1, -2)),
    "aten.numpy_T": lambda v, s, x: (_aten.permute.default, (x, list(reversed(range(x.meta["val"].dim()))))),
    "aten.permute": lambda v, s, x: (_aten.permute.default, (x, _inverse_permutation(v.args[1]))),
    "aten.movedim": lambda v, s, x: (v.target, (x, v.args[2], v.args[1])),
}
