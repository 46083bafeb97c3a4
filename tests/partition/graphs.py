"""Small hand-made graphs and cost tables for tests of the planner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from rannc_hf.capture.graph import Block, Graph, ParameterSpec, ValueSpec
from rannc_hf.cost.devices import DEVICES
from rannc_hf.cost.table import BlockCost, CostTable

aten = torch.ops.aten


def make_graph(
    widths: Sequence[int],
    hidden: int = 8,
    seq: int = 4,
    skips: Sequence[tuple[int, int]] = (),
    tied: Sequence[tuple[int, int]] = (),
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """A chain of blocks `y = gelu(x @ up) @ down` with inner width `widths[k]`; the last one returns the mean.

    A skip (p, c) adds the output of block p to the input of block c; a tie (a, b) lets block b use the `up` of block a.
    """
    graph = fx.Graph()
    values: dict[str, ValueSpec] = {}
    parameters: dict[str, ParameterSpec] = {}
    inputs: dict[str, str] = {}

    def note(node: fx.Node, shape: tuple[int, ...], batch: bool = True, grad: bool = True) -> fx.Node:
        values[node.name] = ValueSpec(shape, dtype, 0 if batch else None, 1, grad)
        node.meta["needs_grad"] = grad
        return node

    x = note(graph.placeholder("x"), (1, seq, hidden), grad=False)
    owner = {b: a for a, b in tied}
    weights: dict[str, fx.Node] = {}
    for k, width in enumerate(widths):
        for kind, shape in (("up", (width, hidden)), ("down", (hidden, width))):
            name = f"layer.{k}.{kind}"
            if kind == "up" and k in owner:
                continue
            weights[name] = note(graph.placeholder(f"p_{k}_{kind}"), shape, batch=False)
            parameters[name] = ParameterSpec(name, shape, torch.float32, True)
            inputs[weights[name].name] = name
    blocks: list[Block] = []
    outputs: list[fx.Node] = []
    for k, width in enumerate(widths):
        nodes: list[fx.Node] = []
        used = [outputs[p] for p, c in skips if c == k]
        value = outputs[-1] if outputs else x
        own_inputs = dict.fromkeys(n.name for n in (value, *used) if n is not x)
        for other in used:
            value = note(graph.call_function(aten.add.Tensor, (value, other)), (1, seq, hidden))
            nodes.append(value)
        up, down = f"layer.{owner.get(k, k)}.up", f"layer.{k}.down"
        inner = note(graph.call_function(aten.linear.default, (value, weights[up])), (1, seq, width))
        active = note(graph.call_function(aten.gelu.default, (inner,)), (1, seq, width))
        value = note(graph.call_function(aten.linear.default, (active, weights[down])), (1, seq, hidden))
        nodes += [inner, active, value]
        outputs.append(value)
        if k == len(widths) - 1:
            value = note(graph.call_function(aten.mean.default, (value,)), (), batch=False)
            nodes.append(value)
        last = k == len(widths) - 1
        blocks.append(
            Block(
                index=k,
                name=f"layer.{k}",
                key=f"{width}.{len(used)}.{k == 0}.{last}",
                nodes=tuple(n.name for n in nodes),
                parameters=(up, down),
                inputs=tuple(own_inputs),
                preamble=() if outputs[:-1] else (x.name,),
                outputs=(value.name,),
            )
        )
    graph.output((value,))
    return Graph(
        fx_graph=graph,
        training=True,
        parameters=parameters,
        parameter_inputs=inputs,
        buffer_inputs={},
        constants={},
        batch_inputs={"x": "x"},
        counts=(),
        values=values,
        preamble=frozenset({"x"}),
        blocks=tuple(blocks),
        loss=value.name,
        outputs={"loss": value.name},
        structural_hash=f"test-{list(widths)}-{list(skips)}-{list(tied)}-{dtype}",
    )


def make_costs(
    graph: Graph,
    forward_us: Sequence[float],
    saved: int = 1000,
    device: str = "CPU",
    fixed_us: float = 1.0,
    again: float = 1.0,
) -> CostTable:
    """Costs of each block: `fixed_us + forward_us[block] * samples`, backward twice that; keys must be unique.

    Computing a forward again takes `again` times as long.
    """
    points = {}
    for block, each in zip(graph.blocks, forward_us):
        points[block.key] = tuple(
            BlockCost(
                n,
                fixed_us + each * n,
                2 * (fixed_us + each * n),
                again * (fixed_us + each * n),
                saved * n * (1 + block.index % 3),
                128 * n,
                64 * n,
            )
            for n in (1, 2)
        )
    names = {b.key: b.name for b in graph.blocks}
    assert len(points) == len(graph.blocks), "two blocks have one key"
    return CostTable(DEVICES[device], torch.float32, points, names, "measured")
