"""Cost of blocks from their FLOPs and bytes, for devices one does not have.

Each operation takes as long as its FLOPs or its bytes need, whichever is longer (the roofline: Williams, Waterman and
Patterson, CACM 2009), plus a fixed time. A block takes at least as long as the host needs to issue its operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx as fx

from rannc_hf.capture.graph import Block, Graph
from rannc_hf.cost import ops
from rannc_hf.cost.devices import Device
from rannc_hf.cost.memory import block_memory, parameter_bytes
from rannc_hf.cost.table import BlockCost, CostTable
from rannc_hf.cost.work import BANDWIDTH_EFFICIENCY, Work, backward_work, forward_work

_FITTED_BANDWIDTH = 4.8e12


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
            points[block.key] = tuple(block_cost(graph, block, device, n) for n in sizes)
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


def block_cost(graph: Graph, block: Block, device: Device, samples: int) -> BlockCost:
    """Costs of one block."""
    nodes = graph.nodes
    forward = backward = 0.0
    forward_kernels = backward_kernels = 0
    for name in block.nodes:
        node = nodes[name]
        if ops.is_view(node, graph):
            continue
        work = forward_work(node, graph, samples)
        forward += _time_us(work, node, graph, device)
        forward_kernels += work.kernels
        if ops.needs_grad(node, graph):
            work = backward_work(node, graph, samples)
            backward += _time_us(work, node, graph, device)
            backward_kernels += work.kernels
    backward += _accumulation_us(graph, block, device)
    backward_kernels += len(_trained(graph, block))
    memory = block_memory(graph, block, samples, cpu=device.is_cpu)
    forward = max(forward, forward_kernels * device.host_us)
    return BlockCost(
        samples,
        forward,
        max(backward, backward_kernels * device.host_us),
        forward,
        memory.saved,
        memory.output,
        memory.workspace,
    )


def _accumulation_us(graph: Graph, block: Block, device: Device) -> float:
    """Time to add the gradients of a microbatch to their sum in float32: read both, write one."""
    trained = _trained(graph, block)
    size = sum(parameter_bytes(graph, p) + 8 * graph.parameters[p].numel for p in trained)
    return size / (device.memory_bandwidth * BANDWIDTH_EFFICIENCY) * 1e6 + len(trained) * device.kernel_us


def _trained(graph: Graph, block: Block) -> list[str]:
    return [p for p in block.parameters if graph.parameters[p].trainable]


def _time_us(work: Work, node: fx.Node, graph: Graph, device: Device) -> float:
    compute = 0.0
    if work.flops:
        spec = graph.values.get(node.name)
        # A CPU's entry in the table is already what it reaches.
        efficiency = 1.0 if device.is_cpu else work.efficiency
        compute = work.flops / (device.rate(spec.dtype if spec is not None else torch.float32) * efficiency)
    memory = work.bytes / (device.memory_bandwidth * BANDWIDTH_EFFICIENCY)
    # Fitted at the bandwidth of an H200.
    extra = work.extra_us * _FITTED_BANDWIDTH / device.memory_bandwidth
    return max(compute, memory) * 1e6 + extra + work.kernels * device.kernel_us
