"""Cost of blocks measured on the present device, one unique block at a time, with made-up inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from rannc_hf.capture.graph import Block, Graph, ValueSpec
from rannc_hf.capture.instantiate import block_function
from rannc_hf.cost.analytic import accumulation_us, main_dtype
from rannc_hf.cost.devices import Device
from rannc_hf.cost.memory import block_memory
from rannc_hf.cost.table import BlockCost, CostTable

_REPEATS = 5
"""Runs after the first one; the fastest counts, because others may have been disturbed."""
_ENOUGH_US = 2e5
"""Larger numbers of samples are left to extrapolation once a forward and backward takes this long, twice."""


def measured_costs(graph: Graph, device: Device, where: torch.device, max_samples: int) -> CostTable:
    """Costs of the unique blocks of `graph` on `where`, at powers of two up to `max_samples` samples.

    `device` describes `where` for the planner. Forward and backward are measured, adding up gradients and memory are
    what the graph says. A block that does not fit with so many samples, or takes long, is measured with fewer.

    Raises ValueError where a block does not fit with a single sample.
    """
    points: dict[str, tuple[BlockCost, ...]] = {}
    names: dict[str, str] = {}
    for block in graph.blocks:
        if block.key not in points:
            points[block.key] = _measure(graph, block, device, where, max_samples)
            names[block.key] = block.name
    return CostTable(device, main_dtype(graph), points, names, "measured")


def _measure(
    graph: Graph, block: Block, device: Device, where: torch.device, max_samples: int
) -> tuple[BlockCost, ...]:
    points: list[BlockCost] = []
    samples, slow = 1, 0
    while samples <= max_samples and slow < 2:
        try:
            forward, backward = _times_us(graph, block, samples, where)
        except torch.OutOfMemoryError:
            if not points:
                raise ValueError(
                    f"block {block.index} ({block.name}) does not fit on {where} with one sample"
                ) from None
            break
        memory = block_memory(graph, block, samples, cpu=device.is_cpu)
        added = accumulation_us(graph, block, device)
        points.append(BlockCost(samples, forward, backward + added, *memory))
        slow += forward + backward > _ENOUGH_US
        samples *= 2
    return tuple(points)


def _times_us(graph: Graph, block: Block, samples: int, where: torch.device) -> tuple[float, float]:
    """The fastest forward and the fastest backward, in microseconds."""
    function = block_function(graph, block, samples, where)
    arguments = _arguments(graph, block, samples, where)
    clock = _cuda_clock if where.type == "cuda" else _host_clock
    leaves = [t for t in arguments if t.requires_grad]
    forwards, backwards = [], []
    for _ in range(_REPEATS + 1):
        outputs, forward_us = clock(partial(function, *arguments))
        heads = [t for t in outputs if t.requires_grad]
        gradients = [torch.ones_like(t) for t in heads]
        differentiate = partial(torch.autograd.grad, heads, leaves, gradients, allow_unused=True)
        forwards.append(forward_us)
        backwards.append(clock(differentiate)[1] if heads else 0.0)
    # The first run also loads kernels.
    return min(forwards[1:]), min(backwards[1:])


def _arguments(graph: Graph, block: Block, samples: int, where: torch.device) -> list[torch.Tensor]:
    placeholders = {name: placeholder for placeholder, name in graph.parameter_inputs.items()}
    names = [*(placeholders[p] for p in block.parameters), *block.inputs, *block.preamble]
    return [_made_up(graph.values[name], samples, where) for name in names]


def _made_up(spec: ValueSpec, samples: int, where: torch.device) -> torch.Tensor:
    """Small random numbers, so that nothing overflows; true masks; zeros as indices, which are always in range."""
    shape = spec.at(samples)
    if spec.dtype.is_floating_point:
        made = torch.randn(shape, device=where, dtype=torch.float32).mul_(0.02).to(spec.dtype)
        return made.requires_grad_(spec.needs_grad)
    if spec.dtype == torch.bool:
        return torch.ones(shape, device=where, dtype=torch.bool)
    return torch.zeros(shape, device=where, dtype=spec.dtype)


def _host_clock(run: Callable[[], Sequence[torch.Tensor]]) -> tuple[Sequence[torch.Tensor], float]:
    started = time.perf_counter()
    result = run()
    return result, (time.perf_counter() - started) * 1e6


def _cuda_clock(run: Callable[[], Sequence[torch.Tensor]]) -> tuple[Sequence[torch.Tensor], float]:
    # From an idle device, so that the time the host needs to issue the operations counts where it is longer.
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return result, (time.perf_counter() - started) * 1e6
