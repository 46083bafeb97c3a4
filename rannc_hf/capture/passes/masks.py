"""Attention without a mask where the mask hides nothing.

Under export Transformers always builds the full attention mask, and an attention kernel that is given a mask cannot be
flash attention: half the speed, twice the memory. A mask is left out when it is the same for every batch and hides
nothing (or just the future: then attention is told to be causal), or when it hides nothing as long as the batch's own
`attention_mask` does not. In the second case there are two variants of the graph, and each step takes the one its batch
allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from ..blocks import rebuilt
from ..graph import Graph
from ..instantiate import preamble_function

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
MASK_FIELDS = ("attention_mask", "decoder_attention_mask")
"""Fields of a batch that are 1 for what attention may see."""
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Unmasked:
    """A variant of a graph that is exact for batches in which every one of `fields` is all ones."""

    graph: Graph
    fields: tuple[str, ...]
    """Empty where it is exact for every batch."""


def unmask(graph: Graph) -> Unmasked | None:
    """The variant of `graph` with as few attention masks as an unpadded batch needs; None where it has the same."""
    by_name = {n.name: n for n in graph.fx_graph.nodes}
    masks = {m for n in graph.fx_graph.nodes if (m := _mask(n)) is not None and m.name in graph.preamble}
    placeholders = {p for p, f in graph.batch_inputs.items() if f in MASK_FIELDS}
    kinds: dict[str, bool] = {}
    needed: set[str] = set()
    for mask in masks:
        inputs = _placeholders(mask, graph)
        used = {p for p in inputs if p in graph.batch_inputs}
        known = all(p in used or p in graph.constants for p in inputs)
        if used <= placeholders and known:
            causal = _causal(graph, mask, used)
            if causal is not None:
                kinds[mask.name] = causal
                needed |= {graph.batch_inputs[p] for p in used}
    if not kinds:
        return None
    return Unmasked(_without(graph, kinds, by_name), tuple(sorted(needed)))


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask that an attention node is given."""
    if node.op != "call_function" or node.target is not _ATTENTION:
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _placeholders(node: fx.Node, graph: Graph) -> Collection[str]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return {n.name for n in seen if n.op == "placeholder"}


def _causal(graph: Graph, mask: fx.Node, ones: Collection[str]) -> bool | None:
    """Whether a mask, for a batch without padding, hides just the future; None where it hides something else.

    False means that it hides nothing.
    """
    spec = graph.values[mask.name]
    if spec.dtype != torch.bool or len(spec.shape) < 2:
        return None
    function, inputs = preamble_function(graph, (mask.name,), 1, _HOST)
    made: Mapping[str, torch.Tensor] = {p: torch.ones(graph.values[p].at(1), dtype=graph.values[p].dtype) for p in ones}
    (value,) = function(*[made[p] if p in made else graph.constants[p] for p in inputs])
    if bool(value.all()):
        return False
    future = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
    return True if bool((value == future).all()) else None


def _without(graph: Graph, causal: Mapping[str, bool], by_name: Mapping[str, fx.Node]) -> Graph:
    """A copy of `graph` whose attention nodes do without the masks in `causal`."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.fx_graph.nodes:
        made = copy.node_copy(node, lambda n: copies[n])
        made.name = node.name
        copies[node] = made
        mask = _mask(made)
        if mask is None or mask.name not in causal:
            continue
        arguments = list(made.args) + [None, 0.0, False][len(made.args) - 3 :]
        arguments[4] = made.kwargs.get("dropout_p", arguments[4])
        arguments[3], arguments[5] = None, causal[mask.name]
        made.args = tuple(arguments)
        made.kwargs = {k: v for k, v in made.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    result = replace(graph, fx_graph=copy)
    return replace(result, blocks=tuple(rebuilt(result, b) for b in graph.blocks))
