"""Inline `no_grad` regions, which export keeps as nested graphs."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor


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
            own = set(environment.values()) - set(inputs)
            results = fx.map_arg(results, lambda x: _left(module.graph, x, own))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _left(graph: fx.Graph, node: fx.Node, own: Collection[fx.Node]) -> fx.Node:
    """What leaves a `no_grad` region as `node`; `own` are the region's nodes."""
    first = node
    while first in own and (given := _given_back(first)) is not None:
        first = given
    return first if first not in own else _detached(graph, node)


def _given_back(node: fx.Node) -> fx.Node | None:
    """The argument that an operation returns as it is (``x.to(x.dtype)``): the same tensor, gradients and all.

    From there on export takes the operation's result for that tensor, outside of the region too.
    """
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return None
    if not isinstance(value, FakeTensor):
        return None
    given = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), FakeTensor)]
    if not any(n.meta["val"].shape == value.shape and n.meta["val"].dtype == value.dtype for n in given):
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with value.fake_mode, torch.no_grad():
        result = node.target(*args, **kwargs)
    return next((n for n in given if n.meta["val"] is result), None)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    copy = graph.call_function(torch.ops.aten.detach.default, (node,))
    copy.meta = dict(node.meta)
    return copy
