"""Memory of blocks and parameters, from the graph alone.

Autograd keeps a tensor where the derivative of an operation needs it. Which ones these are follows from the
derivatives (PyTorch's `derivatives.yaml`); views share the memory of what they view, and a tensor that several
operations keep counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.fx as fx

from rannc_hf.capture.graph import Block, Graph
from rannc_hf.capture.opaque.operation import is_opaque, region_of
from rannc_hf.cost import ops

_KEEPS_NOTHING = ops.words(
    "add sub rsub neg sum mean cat stack pad constant_pad_nd to _to_copy type_as contiguous reshape flatten clone copy "
    "where embedding masked_fill index index_select gather slice_scatter select_scatter repeat roll flip new_zeros "
    "zeros_like ones_like full_like cumsum cross_entropy_loss nll_loss nll_loss_forward dropout native_dropout"
)
_KEEPS_OUTPUT = ops.words("softmax _softmax log_softmax _log_softmax tanh sigmoid relu exp sqrt rsqrt reciprocal")


class BlockMemory(NamedTuple):
    """Bytes; see `BlockCost` for what they mean."""

    saved: int
    output: int
    workspace: int


def block_memory(graph: Graph, block: Block, samples: int, *, cpu: bool) -> BlockMemory:
    """What `block` keeps for its backward, hands on, and needs while it runs, for `samples` samples.

    `cpu` tells the kernels apart: a CPU computes attention with dropout in single steps and keeps the noise of a
    dropout, where GPUs fuse the attention and keep a mask.
    """
    nodes = graph.nodes
    inside = [nodes[name] for name in block.nodes]
    base = _bases(inside, graph)
    kept: set[fx.Node] = {base[nodes[name]] for name in block.outputs}
    extra = 0
    largest = 0
    for node in inside:
        touched = {base.get(n, n) for n in (node, *node.all_input_nodes)}
        if not ops.is_view(node, graph):
            temporary = sum(ops.value_bytes(n, graph, samples) for n in touched if n in base)
            largest = max(largest, temporary + _internal_bytes(node, graph, samples, cpu))
        if ops.needs_grad(node, graph):
            kept |= {base[n] for n in _kept(node, graph, cpu) if n in base}
            extra += _internal_bytes(node, graph, samples, cpu)
    own = set(inside)
    saved = sum(ops.value_bytes(n, graph, samples) for n in kept if n in own) + extra
    output = sum(ops.value_bytes(n, graph, samples) for n in {base[nodes[name]] for name in block.outputs} if n in own)
    # Values on their way and their gradients; and the gradients of the block's parameters before they are added up.
    workspace = 2 * largest + sum(parameter_bytes(graph, name) for name in block.parameters)
    return BlockMemory(saved, output, workspace)


def _bases(inside: list[fx.Node], graph: Graph) -> dict[fx.Node, fx.Node]:
    """For each node the one whose memory it shares; nodes from outside the block map to themselves or are absent."""
    base: dict[fx.Node, fx.Node] = {}
    for node in inside:
        if ops.is_view(node, graph) and node.all_input_nodes:
            source = node.all_input_nodes[0]
            root = base.get(source, source)
            # Items of an operation with several results (not a view of one tensor) have memory of their own.
            shares = root.name in graph.values
            base[node] = root if shares else node
        else:
            base[node] = node
    return base


def _kept(node: fx.Node, graph: Graph, cpu: bool) -> list[fx.Node]:
    """Inputs and results that the derivative of `node` uses."""
    name = ops.op_name(node)
    inputs = node.all_input_nodes
    if "scaled_dot_product" in name:
        return inputs[:3] if _in_steps(node, graph, cpu) else [node, *inputs]
    if ops.is_view(node, graph) or name in _KEEPS_NOTHING or "dropout" in name:
        return []
    factors = ops.matmul_operands(node) or (tuple(inputs[:2]) if name in ("mul", "div") else None)
    if factors is not None:
        pairs = (factors, factors[::-1])
        return [pair[0] for pair in pairs if len(pair) == 2 and ops.needs_grad(pair[1], graph)]
    return [node] if name in _KEEPS_OUTPUT else list(inputs)


def _in_steps(node: fx.Node, graph: Graph, cpu: bool) -> bool:
    """Whether an attention runs as separate products and a softmax, not as one fused kernel."""
    mask = ops.argument(node, 3, "attn_mask")
    learned = isinstance(mask, fx.Node) and ops.needs_grad(mask, graph)
    return cpu and (learned or ops.dropout_active(node))


def _internal_bytes(node: fx.Node, graph: Graph, samples: int, cpu: bool) -> int:
    """Bytes that an operation keeps besides its inputs and results."""
    name, spec = ops.op_name(node), graph.values.get(node.name)
    if is_opaque(node):
        return int(graph.opaque[region_of(node)].saved * samples)
    if spec is None:
        return 0
    if name == "cross_entropy_loss":
        return ops.value_bytes(node.all_input_nodes[0], graph, samples)
    if "scaled_dot_product" in name:
        return _attention_bytes(node, graph, samples, cpu)
    if ops.dropout_active(node):
        return math.prod(spec.at(samples)) * (spec.dtype.itemsize if cpu else 1)
    if name in ("layer_norm", "native_layer_norm", "rms_norm", "group_norm"):
        # Mean and inverse deviation of each row.
        return 8 * math.prod(spec.at(samples)[:-1])
    return 0


def _attention_bytes(node: fx.Node, graph: Graph, samples: int, cpu: bool) -> int:
    query, key = (graph.values[n.name].at(samples) for n in node.all_input_nodes[:2])
    rows, item = math.prod(query[:-1]), graph.values[node.name].dtype.itemsize
    if _in_steps(node, graph, cpu):
        # Probabilities, and with dropout its noise and what is left.
        return (3 if ops.dropout_active(node) else 1) * rows * key[-2] * item
    mask = ops.argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node) and mask.name in graph.values and graph.values[mask.name].dtype == torch.bool:
        # It becomes a bias in the dtype of the scores.
        return rows * 4 + math.prod(graph.values[mask.name].at(samples)) * item
    return rows * 4


def compute_dtypes(graph: Graph) -> Mapping[str, torch.dtype]:
    """Canonical parameter name to the dtype it is computed with."""
    return {
        name: graph.values[placeholder].dtype
        for placeholder, name in graph.parameter_inputs.items()
        if placeholder in graph.values
    }


def parameter_bytes(graph: Graph, name: str) -> int:
    """Bytes of one copy of a parameter in the dtype it is computed with."""
    spec = graph.parameters[name]
    return spec.numel * _cached_dtypes(graph).get(name, spec.dtype).itemsize


def _cached_dtypes(graph: Graph) -> Mapping[str, torch.dtype]:
    found: Mapping[str, torch.dtype] | None = graph.__dict__.get("_compute_dtypes")
    if found is None:
        found = graph.__dict__["_compute_dtypes"] = compute_dtypes(graph)
    return found
