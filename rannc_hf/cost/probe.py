"""What the present device reaches: matrix products, memory, and the overheads of single operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from rannc_hf.cost.machine import synchronize
from rannc_hf.cost.work import BANDWIDTH_EFFICIENCY, MATMUL_EFFICIENCY

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUND_S = 0.05
"""How long a round repeats an operation, unless once takes longer."""
_ROUNDS = 3
"""The fastest counts: others may have been disturbed."""
_REPEATS = 50
_LARGE_S = 5e-3
"""A matrix product that takes this long is a large one."""


@dataclass(frozen=True)
class Reached:
    """What was measured. Rates are those that large operations reach, not peaks."""

    matmul_flops: dict[str, float]
    """FLOP/s of large matrix products by dtype, with PyTorch's default precision (no TF32)."""
    memory_bandwidth: float
    """Bytes per second that a large copy reads and writes."""
    kernel_us: float
    """Device time of an operation on a few numbers."""
    host_us: float
    """Host time to issue an operation, recording and running its backward included; 0 on a CPU, which does not wait."""

    def figures(self, is_cpu: bool) -> dict[str, Any]:
        """Fields of `Device`: peaks of which the cost model takes a share, so that it comes to what was reached."""
        share = 1.0 if is_cpu else MATMUL_EFFICIENCY
        return {
            "matmul_flops": {kind: rate / share for kind, rate in self.matmul_flops.items()},
            "memory_bandwidth": self.memory_bandwidth / BANDWIDTH_EFFICIENCY,
            "kernel_us": self.kernel_us,
            "host_us": self.host_us,
        }


def probe(where: torch.device) -> Reached:
    """Measure `where`, which nothing else should use meanwhile. Takes seconds, and about 2 GiB on CUDA."""
    with torch.no_grad():
        rates = {str(kind).removeprefix("torch."): _matmul_flops(where, kind) for kind in _DTYPES}
        bandwidth, kernel = _bandwidth(where), _kernel_us(where)
    return Reached(rates, bandwidth, kernel, _host_us(where) if where.type == "cuda" else 0.0)


def seconds_of(run: Callable[[], object], where: torch.device) -> float:
    """Time of one `run` when many follow each other, the first of all apart."""
    run()
    once = _round(run, 1, where)
    repeats = max(1, min(_REPEATS, int(_ROUND_S / once)))
    return min(_round(run, repeats, where) for _ in range(_ROUNDS))


def _round(run: Callable[[], object], repeats: int, where: torch.device) -> float:
    synchronize(where)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(where)
    return max(time.perf_counter() - started, 1e-7) / repeats


def _matmul_flops(where: torch.device, kind: torch.dtype) -> float:
    size, seconds = 128, 0.0
    while seconds < _LARGE_S and size < 8192:
        size *= 2
        left, right = (torch.randn(size, size, device=where).to(kind) for _ in range(2))
        seconds = seconds_of(partial(torch.mm, left, right), where)
    return 2 * size**3 / seconds


def _bandwidth(where: torch.device) -> float:
    # Far larger than any cache.
    count = 2**28 if where.type == "cuda" else 2**25
    source = torch.ones(count, dtype=torch.float32, device=where)
    target = torch.empty_like(source)
    return 2 * 4 * count / seconds_of(lambda: target.copy_(source), where)


def _kernel_us(where: torch.device) -> float:
    value = torch.ones(16, device=where)
    count = 500

    def run() -> None:
        for _ in range(count):
            value.add_(1.0)

    if where.type != "cuda":
        return seconds_of(run, where) / count * 1e6
    # From a recorded graph, so that the host does not hold the device up.
    run()
    torch.cuda.synchronize(where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return seconds_of(graph.replay, where) / count * 1e6


def _host_us(where: torch.device) -> float:
    """Of small layers forward and backward, which the device is done with before the host issues the next."""
    layers = 40
    weight, bias = torch.randn(16, 16, device=where), torch.randn(16, device=where)
    weight.requires_grad_()
    bias.requires_grad_()
    value = torch.randn(16, 16, device=where, requires_grad=True)

    def run() -> None:
        x = value
        for _ in range(layers):
            x = functional.gelu(x @ weight + bias)
        x.sum().backward()

    # Forward: product, sum, activation. Backward: activation, sum over rows, two products, two additions to gradients.
    operations = layers * (3 + 6)
    return seconds_of(run, where) / operations * 1e6
