"""How much an operation does, forward and backward: FLOPs, bytes and kernels, with the efficiency they reach.

Factors were fitted to single operations of BERT layers (hidden 1024 and 2048, 8 and 32 samples of 512 tokens, bf16,
dropout 0.1), timed on an H200 with torch 2.11.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.fx as fx

from rannc_hf.capture.graph import Graph
from rannc_hf.cost import ops

MATMUL_EFFICIENCY = 0.78
"""Share of the peak that large matrix products reach (790 of 989 TFLOP/s)."""
BANDWIDTH_EFFICIENCY = 0.8
"""Share of the peak bandwidth that large operations reach."""
_UNALIGNED_EFFICIENCY = 0.26
"""Products whose rows do not start at multiples of 16 bytes, e.g. a vocabulary of 30522."""
_ATTENTION_EFFICIENCY = (0.45, 0.45)
"""Forward, backward."""
_DROPPING_EFFICIENCY = (0.17, 0.23)
"""Fused attention that drops probabilities draws a random number for each."""
_MASKED_EFFICIENCY = (0.2, 0.2)
# The backward of fused attention computes the scores again: five products where the forward has two.
_ATTENTION_BACKWARD = 2.5

_TRAFFIC: dict[str, tuple[float, float]] = {
    "layer_norm": (1.9, 3.2),
    "rms_norm": (1.9, 3.2),
    "group_norm": (1.9, 3.2),
    "dropout": (1.6, 0.8),
    "gelu": (1.2, 1.1),
    "to": (1.7, 0.7),
    "cross_entropy_loss": (0.9, 1.6),
}
"""Bytes moved, as multiples of reading the inputs and writing the result once, forward and backward."""
_SUMS_UP = ops.words("add sub rsub mul div where")
"""Operations whose inputs are broadcast: the gradient of a smaller one is a sum."""
_PASSES_ON = ops.words("add")
"""The gradient of an input of full size is that of the result itself."""
_BIAS_BYTE_US = 1e-6
"""The sum of gradients over rows, for a bias: microseconds a byte, a fifth of the bandwidth."""
_LOOKUP_ROW_US = 0.021
"""Backward of an embedding: sorting indices and adding up rows, a row."""


class Work(NamedTuple):
    """What an operation does in one direction."""

    flops: float
    bytes: float
    kernels: int
    efficiency: float = MATMUL_EFFICIENCY
    extra_us: float = 0.0
    """Time on top that grows as the bandwidth shrinks, on an H200."""


def forward_work(node: fx.Node, graph: Graph, samples: int) -> Work:
    """Of the forward of `node`."""
    size = sum(ops.value_bytes(n, graph, samples) for n in (node, *node.all_input_nodes))
    name = ops.op_name(node)
    traffic = _TRAFFIC.get(name, (1.0, 1.0))[0]
    if name == "embedding":
        # Reads the rows it needs, not the table.
        return Work(0.0, 2 * ops.value_bytes(node, graph, samples), 1)
    if name == "cross_entropy_loss":
        return Work(0.0, 3 * size * traffic, 2)
    return Work(ops.forward_flops(node, graph, samples), size * traffic, 1, _efficiency(node, graph, 0))


def backward_work(node: fx.Node, graph: Graph, samples: int) -> Work:
    """Of the backward of `node`, and of adding up the gradients of its result where several operations use it."""
    work = _backward(node, graph, samples)
    users = sum(ops.needs_grad(user, graph) for user in node.users)
    if users < 2:
        return work
    added = (users - 1) * 3 * ops.value_bytes(node, graph, samples)
    return work._replace(bytes=work.bytes + added, kernels=work.kernels + users - 1)


def _backward(node: fx.Node, graph: Graph, samples: int) -> Work:
    name = ops.op_name(node)
    own = ops.value_bytes(node, graph, samples)
    carriers = [n for n in node.all_input_nodes if ops.needs_grad(n, graph)]
    gradients = sum(ops.value_bytes(n, graph, samples) for n in carriers)
    traffic = _TRAFFIC.get(name, (1.0, 1.0))[1]
    if (operands := ops.matmul_operands(node)) is not None:
        return _product_backward(node, operands, carriers, graph, samples)
    if "scaled_dot_product" in name:
        flops = ops.forward_flops(node, graph, samples) * _ATTENTION_BACKWARD
        return Work(flops, 3 * own + 2 * gradients, 2, _efficiency(node, graph, 1))
    if name == "cross_entropy_loss":
        return Work(0.0, 3 * gradients * traffic, 2)
    if name == "embedding":
        rows = own / max(1, ops.value_bytes(carriers[0], graph, samples) / graph.values[carriers[0].name].shape[0])
        return Work(0.0, 2 * gradients + 3 * own, 3, extra_us=rows * _LOOKUP_ROW_US)
    if name in _SUMS_UP:
        return _elementwise_backward(name, own, carriers, graph, samples)
    return Work(0.0, (own + 2 * gradients) * traffic, 1)


def _product_backward(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], carriers: list[fx.Node], graph: Graph, samples: int
) -> Work:
    own = ops.value_bytes(node, graph, samples)
    left, right = operands
    used = [other for n, other in ((left, right), (right, left)) if ops.needs_grad(n, graph)]
    sums = len(carriers) - len(used)
    moved = sum(ops.value_bytes(n, graph, samples) for n in (*used, *carriers)) + own * len(used)
    flops = ops.forward_flops(node, graph, samples) * len(used)
    # A kernel cannot begin before the one before it is done: the sum for a bias adds its own time.
    return Work(flops, moved, len(carriers), _efficiency(node, graph, 1), sums * own * _BIAS_BYTE_US)


def _elementwise_backward(name: str, own: int, carriers: list[fx.Node], graph: Graph, samples: int) -> Work:
    moved = kernels = 0
    for carrier in carriers:
        size = ops.value_bytes(carrier, graph, samples)
        if size == own and name in _PASSES_ON:
            continue
        kernels += 1
        moved += own + size if name in _PASSES_ON else 2 * own + size
    return Work(0.0, moved, kernels)


def _efficiency(node: fx.Node, graph: Graph, direction: int) -> float:
    if "scaled_dot_product" in ops.op_name(node):
        if ops.argument(node, 3, "attn_mask") is not None:
            return _MASKED_EFFICIENCY[direction]
        return (_DROPPING_EFFICIENCY if ops.dropout_active(node) else _ATTENTION_EFFICIENCY)[direction]
    operands = ops.matmul_operands(node)
    specs = [graph.values.get(n.name) for n in (node, *(operands or ()))]
    rows = [s.shape[-1] * s.dtype.itemsize for s in specs if s is not None and s.shape and s.dtype.itemsize < 4]
    # Narrow results (a classifier of two labels) take no time anyway.
    unaligned = any(row % 16 and row > 512 for row in rows)
    return _UNALIGNED_EFFICIENCY if unaligned else MATMUL_EFFICIENCY
