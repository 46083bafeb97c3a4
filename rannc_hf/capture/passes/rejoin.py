"""Parts of a tensor put together again are the tensor.

A model that takes images one by one out of a tensor, as a list, and later concatenates the list has as many operations
as there are samples. Without the detour it has one, for any number of samples.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .schema import argument, name_of

_aten = torch.ops.aten
_PARTS = ("aten.unbind", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_chunk", "aten.unsafe_split")


def rejoin(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Rewrite `graph` in place: each concatenation of all parts of a tensor, in order, becomes a view of it."""
    for node in list(graph.nodes):
        source = _source(node)
        if source is None:
            continue
        shape = list(node.meta["val"].shape)
        if any(isinstance(n, torch.SymInt) for n in shape):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(_aten.reshape.default, (source, shape))
        made.meta = dict(node.meta)
        with fake_mode:
            made.meta["val"] = _aten.reshape.default(source.meta["val"], shape)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node | None:
    """What the inputs of a concatenation are all the parts of, where joining them gives its entries in order."""
    if node.op != "call_function" or name_of(node) not in ("aten.cat", "aten.stack"):
        return None
    parts: Any = node.args[0]
    if not all(isinstance(p, fx.Node) and p.target is operator.getitem for p in parts):
        return None
    whole = parts[0].args[0]
    if any(p.args != (whole, i) for i, p in enumerate(parts)) or name_of(whole) not in _PARTS:
        return None
    if len(whole.meta["val"]) != len(parts):
        return None
    source: Any = whole.args[0]
    rank = source.meta["val"].dim()
    taken = argument(whole, "dim") % rank
    given = argument(node, "dim") % node.meta["val"].dim()
    unbound, stacked = name_of(whole) == "aten.unbind", name_of(node) == "aten.stack"
    # Parts of `unbind` have lost the dimension: joined along the next one they are where they were.
    alike = given == taken and (unbound or not stacked)
    return source if alike else None
