"""Rewrite ``x[mask] = value`` as ``where(mask, value, x)``, where all entries that the mask picks get the same value.

So each entry depends on its own bit of the mask alone, and the size of nothing on how many bits are set, in the
backward neither: the gradient of `value` is the masked sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .schema import argument

_aten = torch.ops.aten


def write_by_where(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Rewrite functional `index_put`s by one mask over the first dimensions of what is written to."""
    for node in list(graph.find_nodes(op="call_function", target=_aten.index_put.default)):
        mask, values = _written(node)
        if mask is None:
            continue
        table: Any = node.args[0]
        with graph.inserting_before(node):
            for _ in range(table.meta["val"].dim() - mask.meta["val"].dim()):
                mask = _call(node, fake_mode, _aten.unsqueeze.default, mask, -1)
            chosen = _call(node, fake_mode, _aten.where.self, mask, values, table)
        node.replace_all_uses_with(chosen)
        graph.erase_node(node)


def _written(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """The mask, None where this is something else, and the value."""
    indices, values = argument(node, "indices"), argument(node, "values")
    table, mask = node.args[0].meta["val"], indices[0] if len(indices) == 1 else None  # type: ignore[union-attr]
    if mask is None or mask.meta["val"].dtype != torch.bool or argument(node, "accumulate"):
        return None, values
    own, value = mask.meta["val"], values.meta["val"]
    # How many values there are may be known to nobody before the mask is.
    single = value.dim() <= table.dim() and statically_known_true(value.numel() == 1)
    same = value.dim() <= table.dim() - own.dim() or single
    return mask if own.dim() and table.shape[: own.dim()] == own.shape and same else None, values


def _call(node: fx.Node, fake_mode: FakeTensorMode, target: Any, *args: Any) -> fx.Node:
    made = node.graph.call_function(target, args)
    made.meta = dict(node.meta)
    with fake_mode:
        made.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return made
