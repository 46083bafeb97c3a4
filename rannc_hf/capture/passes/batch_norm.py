"""Batch normalisation: its running statistics as explicit values, its parameters as wide as its statistics.

In training mode it normalises by the statistics of the samples it is given. Of a split batch these are a slice: the
samples of a microbatch that one replica holds, as under DistributedDataParallel those of one rank.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .per_sample import spec
from .schema import argument, name_of, position_of

_aten = torch.ops.aten
_UPDATES = _aten._native_batch_norm_legit_functional.default
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def expose_statistics(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Let batch norms give their new running statistics as values, which are then written; and widen parameters.

    The schema of `aten.batch_norm` does not say that it writes to its running statistics. They are kept in fp32, and so
    are its parameters under autocast: some kernels take no others with them.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _aten.batch_norm.default:
            with graph.inserting_before(node):
                _widen(graph, node, fake_mode)
                if argument(node, "training") and isinstance(argument(node, "running_mean"), fx.Node):
                    _expose(graph, node, fake_mode)


def slice_statistics(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The batch norms that take statistics over samples, with the number of values a sample gives to each channel."""
    found = {}
    for node in nodes:
        source = node.args[0] if takes_statistics(node) else None
        own = spec(source) if isinstance(source, fx.Node) else None
        # Where the samples are channels, each has its own statistics.
        if own is not None and own.batch_dim not in (None, 1):
            found[node] = math.prod(own.shape) // own.shape[1]
    return found


def takes_statistics(node: fx.Node) -> bool:
    """Whether a node normalises by the statistics of its input."""
    if node.op != "call_function":
        return False
    return "batch_norm" in name_of(node) and bool(argument(node, "training"))


def results_of(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node's results depend on: the old running statistics change the new ones alone."""
    return [n for n in node.args[:3] if isinstance(n, fx.Node)] if node.target is _UPDATES else node.all_input_nodes


def is_new_statistic(node: fx.Node) -> bool:
    """Whether a node is a result made for the buffer that it is written to."""
    return node.target is operator.getitem and node.args[0].target is _UPDATES  # type: ignore[union-attr]


def _widen(graph: fx.Graph, node: fx.Node, fake_mode: FakeTensorMode) -> None:
    statistics = argument(node, "running_mean")
    wide = statistics.meta["val"].dtype if isinstance(statistics, fx.Node) else None
    for name in ("weight", "bias"):
        value = argument(node, name)
        if isinstance(value, fx.Node) and wide is not None and value.meta["val"].dtype in _LOW_PRECISION:
            node.update_arg(
                position_of(node, name), _emit(graph, node, fake_mode, _aten.to.dtype, (value, torch.float32))
            )


def _expose(graph: fx.Graph, node: fx.Node, fake_mode: FakeTensorMode) -> None:
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    arguments = tuple(argument(node, name) for name in names)
    made = _emit(graph, node, fake_mode, _UPDATES, arguments)
    normalised = _emit(graph, node, fake_mode, operator.getitem, (made, 0))
    for index, name in ((3, "running_mean"), (4, "running_var")):
        new = _emit(graph, node, fake_mode, operator.getitem, (made, index))
        _emit(graph, node, fake_mode, _aten.copy_.default, (argument(node, name), new))
    node.replace_all_uses_with(normalised)
    graph.erase_node(node)


def _emit(graph: fx.Graph, at: fx.Node, fake_mode: FakeTensorMode, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {k: v for k, v in at.meta.items() if k in ("nn_module_stack", "stack_trace", "no_grad")}
    with fake_mode:
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node
