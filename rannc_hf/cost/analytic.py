"""Cost of blocks from their FLOPs and bytes, for devices one does not have.

Each operation takes as long as its FLOPs or its bytes need, whichever is longer (the roofline: Williams, Waterman and
Patterson, CACM 2009), plus a fixed time. A block takes at least as long as the host needs to issue its operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.fx as fx

from rannc_hf.capture.graph import Block, Graph
from rannc_hf.cost import ops
from rannc_hf.cost.devices import Device
from rannc_hf.cost.memory import block_memory, nodes_by_name, parameter_bytes
from rannc_hf.cost.table import BlockCost, CostTable

# Shares of the peak that large operations reach; matrix products measured on an H200 (790 of 989 TFLOP/s).
_MATMUL_EFFICIENCY = 0.78
_ATTENTION_EFFICIENCY = 0.45
_MASKED_ATTENTION_EFFICIENCY = 0.2
_BANDWIDTH_EFFICIENCY = 0.8
# The backward of fused attention computes the scores again: five products where the forward has two.
_ATTENTION_BACKWARD = 2.5


class _Work(NamedTuple):
    """What an operation does in one direction."""

    flops: float
    bytes: float
    kernels: int
    efficiency: float = _MATMUL_EFFICIENCY


def analytic_costs(graph: Graph, device: Device, samples: int | Iterable[int]) -> CostTable:
    """Costs of the unique blocks of `graph` on `device`.

    `samples` are the numbers of samples to compute costs at; one number stands for the powers of two up to it, and it.
    """
    if isinstance(samples, int):
        samples = {2**i for i in range(samples.bit_length())} | {samples}
    sizes = sorted(set(samples))
    assert sizes and sizes[0] >= 1, sizes
    points: dict[str, tuple[BlockCost, ...]] = {}
    names: dict[str, str] = {}
    for block in graph.blocks:
        if block.key not in points:
            points[block.key] = tuple(_block_cost(graph, block, device, n) for n in sizes)
            names[block.key] = block.name
    return CostTable(device, main_dtype(graph), points, names, "analytic")


def main_dtype(graph: Graph) -> torch.dtype:
    """The dtype in which most parameters are computed with."""
    sizes: dict[torch.dtype, int] = {}
    for placeholder, name in graph.parameter_inputs.items():
        spec = graph.values.get(placeholder)
        kind = spec.dtype if spec is not None else graph.parameters[name].dtype
        sizes[kind] = sizes.get(kind, 0) + graph.parameters[name].numel
    return max(sizes, key=lambda k: sizes[k]) if sizes else torch.float32


def _block_cost(graph: Graph, block: Block, device: Device, samples: int) -> BlockCost:
    nodes = nodes_by_name(graph)
    forward = backward = 0.0
    forward_kernels = backward_kernels = 0
    for name in block.nodes:
        node = nodes[name]
        if ops.is_view(node, graph):
            continue
        work = _forward(node, graph, samples)
        forward += _time_us(work, node, graph, device)
        forward_kernels += work.kernels
        if ops.needs_grad(node, graph):
            work = _backward(node, graph, samples)
            backward += _time_us(work, node, graph, device)
            backward_kernels += work.kernels
    backward += accumulation_us(graph, block, device)
    backward_kernels += len(_trained(graph, block))
    memory = block_memory(graph, block, samples, cpu=device.is_cpu)
    return BlockCost(
        samples,
        max(forward, forward_kernels * device.host_us),
        max(backward, backward_kernels * device.host_us),
        memory.saved,
        memory.output,
        memory.workspace,
    )


def accumulation_us(graph: Graph, block: Block, device: Device) -> float:
    """Time to add the gradients of a microbatch to their sum in float32: read both, write one."""
    trained = _trained(graph, block)
    size = sum(parameter_bytes(graph, p) + 8 * graph.parameters[p].numel for p in trained)
    return size / (device.memory_bandwidth * _BANDWIDTH_EFFICIENCY) * 1e6 + len(trained) * device.kernel_us


def _trained(graph: Graph, block: Block) -> list[str]:
    return [p for p in block.parameters if graph.parameters[p].trainable]


def _time_us(work: _Work, node: fx.Node, graph: Graph, device: Device) -> float:
    compute = 0.0
    if work.flops:
        spec = graph.values.get(node.name)
        # A CPU's entry in the table is already what it reaches.
        efficiency = 1.0 if device.is_cpu else work.efficiency
        compute = work.flops / (device.rate(spec.dtype if spec is not None else torch.float32) * efficiency)
    memory = work.bytes / (device.memory_bandwidth * _BANDWIDTH_EFFICIENCY)
    return max(compute, memory) * 1e6 + work.kernels * device.kernel_us


def _forward(node: fx.Node, graph: Graph, samples: int) -> _Work:
    size = sum(ops.value_bytes(n, graph, samples) for n in (node, *node.all_input_nodes))
    flops = ops.forward_flops(node, graph, samples)
    name = ops.op_name(node)
    if name == "embedding":
        # Reads the rows it needs, not the table.
        size = 2 * ops.value_bytes(node, graph, samples)
    if name == "cross_entropy_loss":
        return _Work(0.0, 3 * size, 2)
    return _Work(flops, size, 1, _efficiency(node))


def _backward(node: fx.Node, graph: Graph, samples: int) -> _Work:
    name = ops.op_name(node)
    own = ops.value_bytes(node, graph, samples)
    carriers = [n for n in node.all_input_nodes if ops.needs_grad(n, graph)]
    gradients = sum(ops.value_bytes(n, graph, samples) for n in carriers)
    flops = ops.forward_flops(node, graph, samples)
    operands = ops.matmul_operands(node)
    if operands is not None:
        left, right = operands
        used = [other for n, other in ((left, right), (right, left)) if ops.needs_grad(n, graph)]
        read = sum(ops.value_bytes(n, graph, samples) for n in used) + own * len(carriers)
        return _Work(flops * len(used), read + gradients, len(carriers))
    if "scaled_dot_product" in name:
        return _Work(flops * _ATTENTION_BACKWARD, 3 * own + 2 * gradients, 2, _efficiency(node))
    if name == "cross_entropy_loss":
        return _Work(0.0, 3 * gradients, 2)
    return _Work(0.0, own + 2 * gradients, 1)


def _efficiency(node: fx.Node) -> float:
    if "scaled_dot_product" not in ops.op_name(node):
        return _MATMUL_EFFICIENCY
    masked = ops.argument(node, 3, "attn_mask") is not None
    return _MASKED_ATTENTION_EFFICIENCY if masked else _ATTENTION_EFFICIENCY
