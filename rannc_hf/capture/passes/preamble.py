"""Mark what depends on no parameter: masks, position ids, rotary tables, shifted labels.

Such values are never sent between stages: each stage that needs one computes it again from the batch.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.fx as fx

from .per_sample import spec
from .schema import FILLS, is_random, name_of

_aten = torch.ops.aten
_NO_DERIVATIVE = {*FILLS, "aten.detach", "aten.rand_like", "aten.randn_like", "aten.randint_like"}


def mark_preamble(graph: fx.Graph, parameter_inputs: Collection[str]) -> set[fx.Node]:
    """The nodes of `graph` that depend on no parameter and draw no random numbers."""
    preamble: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name not in parameter_inputs:
                preamble.add(node)
        elif node.op == "call_function" and not is_random(node) and preamble.issuperset(node.all_input_nodes):
            preamble.add(node)
    return preamble


def copy_outputs(graph: fx.Graph, preamble: Collection[fx.Node]) -> None:
    """Let the user's outputs that are in the preamble, such as a mask, be computed by a block: as copies."""
    output = next(n for n in graph.nodes if n.op == "output")
    for node in [n for n in output.all_input_nodes if n in preamble]:
        with graph.inserting_before(output):
            copy = graph.call_function(_aten.clone.default, (node,))
        copy.meta = dict(node.meta)
        output.replace_input_with(node, copy)


def mark_gradients(graph: fx.Graph, trainable_inputs: Collection[str]) -> set[fx.Node]:
    """The tensors of `graph` through which a gradient flows to a trainable parameter."""
    carriers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in trainable_inputs:
                carriers.add(node)
            continue
        if node.op != "call_function" or name_of(node) in _NO_DERIVATIVE:
            continue
        own = spec(node)
        differentiable = own is None or own.dtype.is_floating_point or own.dtype.is_complex
        if differentiable and any(n in carriers for n in node.all_input_nodes):
            carriers.add(node)
    return carriers
