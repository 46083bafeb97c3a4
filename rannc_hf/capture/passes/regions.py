"""Inline `no_grad` regions, which export keeps as nested graphs."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx


def inline_regions(module: fx.GraphModule) -> None:
    """Replace each region of `module` by its nodes; values leaving a `no_grad` region are detached.

    Nodes from a `no_grad` region have ``meta["no_grad"]``.
    """
    graph = module.graph
    for node in [n for n in graph.nodes if n.op == "call_function" and _is_region(n)]:
        _inline(module, node)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)


def _is_region(node: fx.Node) -> bool:
    return "wrap_with_set_grad_enabled" in getattr(node.target, "__name__", str(node.target))


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    enabled, body, *inputs = node.args
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
            copy.meta["no_grad"] = not enabled
            environment[n] = copy
        if not enabled:
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
