"""Inline `no_grad` and `autocast(enabled=False)` regions, which export keeps as nested graphs."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from ..errors import CaptureError, where

_NO_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def inline_regions(module: fx.GraphModule) -> None:
    """Replace each region of `module` by its nodes; values leaving a `no_grad` region are detached.

    Raises:
        CaptureError: for a region that turns autocast on, whose casts would be lost.
    """
    graph = module.graph
    while regions := [n for n in graph.nodes if n.op == "call_function" and _kind(n)]:
        for node in regions:
            _inline(module, node)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)


def _kind(node: fx.Node) -> str | None:
    name = getattr(node.target, "__name__", str(node.target))
    return next((k for k in (_NO_GRAD, _AUTOCAST) if k in name), None)


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    no_grad = _kind(node) == _NO_GRAD
    if no_grad:
        enabled, body, *inputs = node.args
        detach = not enabled
    else:
        _, _, enabled, _, body, *inputs = node.args
        detach = False
        if enabled:
            raise CaptureError(
                f"{where(node)} turns autocast on inside of forward; choose the precision with mixed_precision instead"
            )
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    environment: dict[fx.Node, Any] = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], inputs))
    results: Any = ()
    with module.graph.inserting_before(node):
        for n in inner.graph.nodes:
            if n.op == "placeholder":
                continue
            if n.op == "output":
                results = fx.map_arg(n.args[0], lambda x: environment[x])
                continue
            copy = module.graph.node_copy(n, lambda x: environment[x])
            if n.op == "get_attr":
                copy.target = f"{body.target}.{n.target}"
            copy.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
            environment[n] = copy
        if detach:
            results = fx.map_arg(results, lambda x: _detached(module.graph, x))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    copy = graph.call_function(torch.ops.aten.detach.default, (node,))
    copy.meta = dict(node.meta)
    return copy
