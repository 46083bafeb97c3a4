"""Make runnable functions of a graph for an exact number of samples on a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_aggregate

from .graph import Block, Graph
from .opaque.operation import is_opaque, region_of
from .opaque.region import Region
from .passes.per_sample import PerSample


def block_function(graph: Graph, block: Block, samples: int, device: torch.device) -> fx.GraphModule:
    """The pure function of `block`: ``f(*parameters, *inputs, *preamble) -> tuple of outputs``.

    It is the same for every block with the same key.
    """
    canonical = graph.parameter_inputs
    made = fx.Graph()
    parameters = {name: made.placeholder(f"p{i}") for i, name in enumerate(block.parameters)}
    values = {name: made.placeholder(f"x{i}") for i, name in enumerate([*block.inputs, *block.preamble])}

    def get(node: fx.Node) -> fx.Node:
        if node.name in canonical:
            return parameters[canonical[node.name]]
        return values[node.name]

    for name in block.nodes:
        values[name] = copy_node(made, graph.nodes[name], get, samples, device, graph.opaque)
    made.output(tuple(values[name] for name in block.outputs))
    return fx.GraphModule({}, made)


def wanted_gradients(graph: Graph, block: Block, live: Collection[str]) -> tuple[bool, ...]:
    """For each argument of the block's function whether training needs its gradient.

    `live`: the graph's `gradient_parameters()`.
    """
    if not graph.training:
        return (False,) * (len(block.parameters) + len(block.inputs) + len(block.preamble))
    values = [graph.values[name].needs_grad for name in block.inputs]
    return (*(name in live for name in block.parameters), *values, *(False for _ in block.preamble))


def sum_dtypes(graph: Graph, block: Block) -> tuple[torch.dtype, ...]:
    """For each parameter of the block the dtype in which its gradients are added up: that of its master."""
    return tuple(graph.parameters[name].dtype for name in block.parameters)


def preamble_function(
    graph: Graph, names: Sequence[str], samples: int, device: torch.device
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A function of graph inputs (returned as placeholder names) that computes the preamble values `names`."""
    needed = _ancestors([graph.nodes[n] for n in names])
    made = fx.Graph()
    copies: dict[str, fx.Node] = {}
    inputs = tuple(n.name for n in graph.fx_graph.nodes if n in needed and n.op == "placeholder")
    for name in inputs:
        copies[name] = made.placeholder(name)
    for node in graph.fx_graph.nodes:
        if node in needed and node.op == "call_function":
            copies[node.name] = copy_node(made, node, lambda n: copies[n.name], samples, device, graph.opaque)
    made.output(tuple(copies[name] for name in names))
    return fx.GraphModule({}, made), inputs


def copy_node(
    made: fx.Graph,
    node: fx.Node,
    get: Callable[[fx.Node], fx.Node],
    samples: int,
    device: torch.device,
    opaque: Mapping[str, Region],
) -> fx.Node:
    """A copy of `node` in `made` with the number of samples and the device filled in, and what an opaque one runs."""

    def resolve(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return get(value)
        if isinstance(value, PerSample):
            return int(value) * samples
        return device if isinstance(value, torch.device) else value

    target: Any = opaque[region_of(node)].function if is_opaque(node) else node.target
    args: Any = map_aggregate(node.args, resolve)
    kwargs: Any = map_aggregate(dict(node.kwargs), resolve)
    return made.call_function(target, args, kwargs)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen
