"""Rewrite ``f(x, out=y)`` as ``y.copy_(f(x))``, so that only one kind of write is left."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .schema import schema

_aten = torch.ops.aten


def rewrite_outs(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Replace operations that write one result to an argument `out` of its shape, where they have a plain form."""
    for node in list(graph.nodes):
        out, plain = node.kwargs.get("out"), _plain(node)
        if plain is None or not isinstance(out, fx.Node):
            continue
        kwargs = {k: v for k, v in node.kwargs.items() if k != "out"}
        with graph.inserting_before(node):
            value = graph.call_function(plain, node.args, kwargs)
            value.meta = dict(node.meta)
            with fake_mode:
                value.meta["val"] = plain(*fx.map_arg(node.args, _fake), **fx.map_arg(kwargs, _fake))
            if value.meta["val"].shape != out.meta["val"].shape:
                graph.erase_node(value)
                continue
            write = graph.call_function(_aten.copy_.default, (out, value))
            write.meta = {**node.meta, "val": out.meta["val"]}
        node.replace_all_uses_with(write)
        graph.erase_node(node)


def _fake(node: fx.Node) -> Any:
    return node.meta["val"]


def _plain(node: fx.Node) -> Any:
    """The overload of the operation without `out`."""
    own = schema(node)
    if own is None or [a.name for a in own.arguments if a.is_out] != ["out"] or len(own.returns) != 1:
        return None
    wanted = [(a.name, str(a.type)) for a in own.arguments if not a.is_out]
    packet: Any = node.target.overloadpacket  # type: ignore[union-attr]
    for name in packet.overloads():
        candidate = getattr(packet, name)
        if [(a.name, str(a.type)) for a in candidate._schema.arguments] == wanted:
            return candidate
    return None
