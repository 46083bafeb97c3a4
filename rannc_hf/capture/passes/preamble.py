"""Mark what depends on no parameter: masks, position ids, rotary tables, shifted labels.

Such values are never sent between stages: each stage that needs one computes it again from the batch.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from .per_sample import spec


def mark_preamble(graph: fx.Graph, parameter_inputs: set[str]) -> set[fx.Node]:
    """The nodes of `graph` that depend on no parameter and draw no random numbers."""
    preamble: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name not in parameter_inputs:
                preamble.add(node)
        elif node.op == "call_function" and not is_random(node) and preamble.issuperset(node.all_input_nodes):
            preamble.add(node)
    return preamble


def mark_gradients(graph: fx.Graph, trainable_inputs: set[str]) -> set[fx.Node]:
    """The tensors of `graph` through which a gradient flows to a trainable parameter."""
    carriers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in trainable_inputs:
                carriers.add(node)
            continue
        if node.op != "call_function" or "detach" in str(node.target):
            continue
        own = spec(node)
        differentiable = own is None or own.dtype.is_floating_point or own.dtype.is_complex
        if differentiable and any(n in carriers for n in node.all_input_nodes):
            carriers.add(node)
    return carriers


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers (dropout that does not drop is not random)."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    name = str(node.target)
    if "dropout" in name:
        return bool(node.args[2]) and bool(node.args[1] != 0.0)
    if "scaled_dot_product_attention" in name:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(rate != 0.0)
    return True
