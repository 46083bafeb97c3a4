"""fp16: the loss scale saves gradients from underflow, and all ranks skip the steps in which any of them overflows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.engine import RanncModel
from rannc_hf.engine.scaler import LossScaler
from rannc_hf.engine.transport import LocalWorld, Transport
from tests.parity.harness import CPU, EXACT_LENGTHS, largest, planner, shards

TINY = 2.0**-23
"""Gradients of activations are about so large: in fp16, whose smallest number is 2^-24, little would be left."""


ACCUMULATED = 2


class Chain(nn.Module):
    """Linear layers whose loss is so flat that its gradients are tiny."""

    def __init__(self, flatness: float = TINY) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.flatness = flatness
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = inputs
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x, targets) * self.flatness


def batch(samples: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {k: torch.randn(samples, 16, generator=generator) for k in ("inputs", "targets")}


class Record:
    """What one run does: steps taken, scales before each, gradients of the first step (unscaled) and weights."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.scales: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}


def train(
    model: nn.Module,
    inner: nn.Module,
    parts: Sequence[dict[str, torch.Tensor]],
    scaler: LossScaler,
    steps: int,
    fused: bool,
) -> Record:
    """The loop of PyTorch's documentation, accumulating two batches a step.

    With several `parts` it does what as many ranks of DistributedDataParallel do: each scales the mean over its own.
    """
    record = Record()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3, eps=1e-4, fused=fused)
    if isinstance(model, RanncModel):
        model.register_optimizer(optimizer)
    for step in range(steps):
        record.scales.append(scaler.get_scale())
        for part in [*parts, *parts]:
            scaler.scale(model(**part) / ACCUMULATED).backward()
        held = dict(model.named_parameters())
        for parameter in held.values() if len(parts) > 1 else ():
            assert parameter.grad is not None
            parameter.grad /= len(parts)
        before = {n: p.detach().clone() for n, p in held.items()}
        if step == 0:
            record.gradients = {n: p.grad / record.scales[0] for n, p in held.items() if p.grad is not None}
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        record.taken.append(any(not torch.equal(p, before[n]) for n, p in held.items()))
        optimizer.zero_grad()
    record.weights = {n: p.detach().clone() for n, p in dict(model.named_parameters()).items()}
    return record


class Autocast(nn.Module):
    """As accelerate wraps a model for fp16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def named_parameters(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.inner(**batch)


def plain(model: nn.Module, ranks: int, steps: int, fused: bool = False, **options: Any) -> Record:
    inner = copy.deepcopy(model)
    return train(Autocast(inner), inner, shards(batch(), ranks), LossScaler("cpu", **options), steps, fused)


def staged(
    model: nn.Module, replicas: Sequence[int], steps: int, fused: bool = False, shard: str = "none", **options: Any
) -> list[Record]:
    parts = shards(batch(), sum(replicas))

    def run(transport: Transport) -> Record:
        inner, scaler = copy.deepcopy(model), LossScaler("cpu", **options)
        scaler.transport = transport
        wrapped = RanncModel(
            inner, EXACT_LENGTHS, device=CPU, transport=transport, planner=planner(replicas, 2, shard=shard),
            compute_dtype=torch.float16, loss_scale=lambda: scaler.current(CPU) / ACCUMULATED,
        )  # fmt: skip
        return train(wrapped, inner, [parts[transport.rank]], scaler, steps, fused)

    return LocalWorld(sum(replicas)).run(run)


def together(records: Sequence[Record]) -> Record:
    """Ranks as one; asserts that they did the same, but for taking steps where they hold nothing."""
    result = Record()
    for record in records:
        assert record.scales == records[0].scales
        result.gradients |= record.gradients
        result.weights |= record.weights
    result.scales = records[0].scales
    result.taken = [any(r.taken[i] for r in records) for i in range(len(result.scales))]
    for record in records:
        assert not record.weights or record.taken == result.taken, "some ranks stepped and others did not"
    return result


@pytest.mark.parametrize(("replicas", "shard"), [((1, 1), "none"), ((1, 2, 1), "none"), ((2, 1), "gradients")], ids=str)
def test_gradients_that_underflow_without_the_scale(replicas: tuple[int, ...], shard: str):
    model = Chain()
    exact = dict(model.named_parameters())
    model(**batch()).backward()
    wanted = {n: p.grad for n, p in exact.items() if p.grad is not None}
    model.zero_grad()
    whole = largest(wanted.values())

    def off(record: Record) -> float:
        assert record.gradients.keys() == wanted.keys()
        return max((record.gradients[n] - g).abs().max().item() for n, g in wanted.items()) / whole

    assert off(plain(model, sum(replicas), 1, init_scale=2.0**16)) < 5e-3, (
        "fp16 with a scale is good to its three digits"
    )
    assert off(together(staged(model, replicas, 1, shard=shard, init_scale=2.0**16))) < 5e-3
    assert off(together(staged(model, replicas, 1, shard=shard, init_scale=1.0))) > 0.05, "the model would not tell"


@pytest.mark.parametrize("fused", [False, True], ids=["unscaled first", "fused"])
@pytest.mark.parametrize("replicas", [(1, 1), (2, 1), (1, 1, 1)], ids=str)
def test_the_scale_falls_grows_and_steps_are_skipped_as_under_ddp(replicas: tuple[int, ...], fused: bool):
    model = Chain(flatness=1.0)
    options = {"init_scale": 2.0**24, "growth_interval": 3}
    expected = plain(model, sum(replicas), 16, fused, **options)
    found = together(staged(model, replicas, 16, fused, **options))
    for record in (expected, found):
        assert not record.taken[0] and record.taken.count(True) >= 3
        for scale, after, taken in zip(record.scales, record.scales[1:], record.taken):
            assert after == scale / 2 if not taken else after in (scale, 2 * scale)
    first = found.taken.index(True)
    assert found.scales[first + 3] == 2 * found.scales[first], "grown after three steps"
    # A microbatch has fewer samples than a rank's batch, so that sums over samples overflow a little later.
    assert 0 <= expected.taken.index(True) - first <= 1


@pytest.mark.parametrize("guilty", [0, 5], ids=["first stage", "last stage"])
def test_one_stage_overflows_and_all_ranks_skip(guilty: int):
    model = Chain(flatness=1.0)

    def run(transport: Transport) -> tuple[bool, bool, float]:
        inner, scaler = copy.deepcopy(model), LossScaler("cpu", init_scale=4.0)
        scaler.transport = transport
        wrapped = RanncModel(
            inner, EXACT_LENGTHS, device=CPU, transport=transport, planner=planner((1, 1, 1), 2),
            compute_dtype=torch.float16, loss_scale=lambda: scaler.current(CPU),
        )  # fmt: skip
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        wrapped.register_optimizer(optimizer)
        scaler.scale(wrapped(**shards(batch(9), 3)[transport.rank])).backward()
        held = dict(wrapped.named_parameters())
        bad = held.get(f"layers.{guilty}.bias")
        if bad is not None:
            assert bad.grad is not None
            bad.grad[3] = float("nan")
        before = {n: p.detach().clone() for n, p in held.items()}
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(p, before[n]) for n, p in held.items())
        return bad is not None, same, scaler.get_scale()

    records = LocalWorld(3).run(run)
    assert sum(bad for bad, _, _ in records) == 1
    assert [(same, scale) for _, same, scale in records] == [(True, 2.0)] * 3


def test_a_rank_without_parameters_follows_the_others():
    def run(transport: Transport) -> tuple[float, bool]:
        scaler = LossScaler("cpu", init_scale=8.0)
        scaler.transport = transport
        parameters = [nn.Parameter(torch.ones(2))] if transport.rank == 0 else []
        optimizer = torch.optim.SGD([{"params": parameters}], lr=1.0)
        stepped = []
        optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        scaler.scale(torch.ones(()))
        for value in (float("inf"), 1.0):
            for parameter in parameters:
                parameter.grad = torch.full((2,), value)
            scaler.step(optimizer)
            scaler.update()
            stepped.append(False)
        return scaler.get_scale(), stepped == [False, True, False]

    assert LocalWorld(2).run(run) == [(4.0, True)] * 2
