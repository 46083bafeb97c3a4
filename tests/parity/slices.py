"""Plain training over the slices of a plan, for models whose buffers or statistics depend on which samples meet.

Losses are means over the samples; the engine weighs a slice's by its share of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rannc_hf.engine import RanncModel
from rannc_hf.engine.program import parameter_stages
from rannc_hf.engine.routes import microbatch_sizes, slices
from tests.parity.harness import (
    EXACT,
    Planner,
    Result,
    compare,
    difference,
    loss_of,
    merge,
    on_ranks,
    optimizer_of,
    planner,
    shards,
    train,
)

Batch = Mapping[str, torch.Tensor]


class SlicedBatchNorm(nn.Module):
    """A batch norm as a stage with replicas computes it: each slice by itself, the first updates the statistics."""

    def __init__(self, norm: Any, replicas: int) -> None:
        super().__init__()
        self.sliced, self.replicas = norm, replicas

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.sliced
        if not self.training:
            return norm(x)
        made = []
        for index, (start, stop) in enumerate(slices(len(x), self.replicas)):
            part = x[start:stop]
            made.append(
                norm(part)
                if index == 0
                else functional.batch_norm(part, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
            )
        return torch.cat(made)


def sliced(model: nn.Module, replicas: Mapping[str, int]) -> nn.Module:
    """A copy of `model` whose batch norms (by name) see slices for their numbers of replicas."""
    model = copy.deepcopy(model)
    for name, count in replicas.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, SlicedBatchNorm(model.get_submodule(name), count))
    return model.train()


def plain(
    model: nn.Module, batch: Batch, microbatches: int, most_replicas: int, steps: int, clip: float = 0.5
) -> Result:
    """Training in one process, microbatch by microbatch."""
    optimizer = optimizer_of(model)
    samples = len(next(iter(batch.values())))
    sizes = microbatch_sizes(samples, samples, microbatches, most_replicas)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        total = 0.0
        for part in zip(*(v.split(sizes) for v in batch.values())):
            loss = loss_of(model(**dict(zip(batch, part)))) * (len(part[0]) / samples)
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = {_plain(n): p.grad.clone() if p.grad is not None else None for n, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Result(losses, gradients, {_plain(n): p.detach().clone() for n, p in model.named_parameters()}, norms)


def _plain(name: str) -> str:
    return name.replace(".sliced.", ".").removeprefix("sliced.") if ".sliced." in name else name


def norms_of(model: nn.Module) -> list[str]:
    """Names of the batch norms."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def check_sliced(
    model: nn.Module,
    batch: Batch,
    replicas: Sequence[int],
    *,
    microbatches: int = 2,
    steps: int = 3,
    schedule: str = "1f1b",
    recompute: str = "none",
    laps: int = 1,
) -> None:
    """Train both ways; losses, gradients, parameters, buffers and evaluation agree to 1e-9."""
    parts = shards(batch, sum(replicas))
    make: Planner = planner(replicas, microbatches, schedule, recompute, laps=laps)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        result = train(wrapped, optimizer, parts[rank], steps)
        assert wrapped.graph is not None and wrapped.plan is not None
        stages = parameter_stages(wrapped.graph, wrapped.plan)
        counts = {n: wrapped.plan.stages[stages[f"{n}.weight"][0]].replicas for n in norms_of(wrapped.module)}
        wrapped.eval()
        buffers = {n: b.clone() for n, b in wrapped.module.named_buffers()}
        return result, counts, buffers, loss_of(wrapped(**parts[rank]))

    found = on_ranks(model, sum(replicas), make, run)
    reference = sliced(model, found[0][1])
    compare(merge([r for r, *_ in found]), plain(reference, batch, microbatches, max(replicas), steps), EXACT)
    reference.eval()
    for rank, (_, _, buffers, loss) in enumerate(found):
        for name, wanted in reference.named_buffers():
            own = buffers[_plain(name)]
            assert own.dtype == wanted.dtype
            assert difference(own.double(), wanted.double(), 1e-6) < 1e-9, f"{name} on rank {rank}"
        with torch.no_grad():
            assert abs(loss_of(reference(**parts[rank])) - loss) < 1e-9
