"""Averages, counters and spectral norms: each replica updates its own buffers, and the first one's are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel, notices
from rannc_hf.engine.routes import microbatch_sizes, slices
from tests.parity.harness import (
    EXACT,
    Result,
    compare,
    difference,
    merge,
    on_ranks,
    optimizer_of,
    planner,
    shards,
    train,
)
from tests.parity.slices import norms_of, plain, sliced
from tests.parity.test_batch_norm import images, resnet

WIDTH, CODES = 6, 5


class Quantizer(nn.Module):
    """Nearest entries of a codebook that follows the activations, with the usual straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(CODES, WIDTH))
        self.register_buffer("count", torch.ones(CODES))
        self.register_buffer("total", self.codes.clone())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = torch.cdist(x.detach(), self.codes).argmin(-1)
        quantised = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                chosen = functional.one_hot(nearest, CODES).to(x.dtype)
                self.count.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.total.mul_(0.9).add_(chosen.t() @ x, alpha=0.1)
                self.codes.copy_(self.total / self.count.unsqueeze(-1))
        return x + (quantised - x).detach(), (x - quantised.detach()).pow(2).mean()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.quantizer = Quantizer()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.spectral(self.layers[0](x).tanh())
        scaled = self.layers[1](h / self.scale)
        if self.training:
            self.steps += 1
            self.scale = self.scale * 0.9 + 0.1 * h.detach().abs().max()
        h, commitment = self.quantizer(scaled)
        logits = self.layers[2](h)
        return functional.cross_entropy(logits, labels) + commitment, logits


def numbers(samples: int) -> dict[str, torch.Tensor]:
    x = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return {"x": x, "labels": torch.arange(samples) % WIDTH}


def data_parallel(model: nn.Module, batch: dict[str, torch.Tensor], replicas: int, steps: int) -> Result:
    """Copies that begin each step with the first one's buffers, and share parameters; `model` is the first."""
    samples = len(batch["x"])
    optimizer = optimizer_of(model)
    losses, norms, gradients = [], [], {}
    for _ in range(steps):
        copies = [model, *(copy.deepcopy(model) for _ in range(replicas - 1))]
        total, start = 0.0, 0
        for size in microbatch_sizes(samples, samples, 2, replicas):
            for own, (a, b) in zip(copies, slices(size, replicas)):
                loss = own(**{k: v[start + a : start + b] for k, v in batch.items()})[0] * ((b - a) / samples)
                loss.backward()
                total += loss.item()
            start += size
        for other in copies[1:]:
            for p, q in zip(model.parameters(), other.parameters()):
                p.grad += q.grad
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Result(losses, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}, norms)


@pytest.mark.parametrize(("replicas", "recompute"), [((1, 1), "blocks"), ((2,), "none"), ((2, 2), "blocks")], ids=str)
def test_equal_plain_training(replicas: tuple[int, ...], recompute: str):
    torch.manual_seed(0)
    model, batch, steps = Model().double().train(), numbers(11), 3
    parts = shards(batch, sum(replicas))

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        result = train(wrapped, optimizer, parts[rank], steps)
        return result, wrapped.full_state_dict(), dict(wrapped.module.named_buffers())

    found = on_ranks(model, sum(replicas), planner(replicas, 2, recompute=recompute), run)
    reference = copy.deepcopy(model)
    compare(merge([r for r, *_ in found]), data_parallel(reference, batch, replicas[0], steps), EXACT)
    state = found[0][1]
    assert set(state) == set(reference.state_dict())
    for name, wanted in reference.named_buffers():
        for *_, own in found:
            assert difference(own[name].double(), wanted.double(), 1e-6) < 1e-9, name
        if name in state:
            assert torch.equal(state[name], found[0][2][name])
    assert reference.steps == 6


def test_losses_of_the_script():
    model, batch = resnet(), images(8)
    parts = shards(batch, 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        for _ in range(2):
            logits = wrapped(**parts[rank])[1]
            functional.cross_entropy(logits, parts[rank]["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {n: b.clone() for n, b in wrapped.module.named_buffers()}

    config = RanncConfig(loss="split")
    found = on_ranks(model, 2, planner((1, 1), 2, "gpipe"), run, config)
    reference = sliced(model, dict.fromkeys(norms_of(model), 1))
    plain(reference, batch, 2, 1, 2, clip=1e9)
    for own in found:
        for name, wanted in reference.named_buffers():
            assert difference(own[name.replace(".sliced.", ".")].double(), wanted.double(), 1e-6) < 1e-9, name


def test_says_what_the_statistics_are_over(monkeypatch: pytest.MonkeyPatch):
    model, batch = resnet(), images(9)
    parts = shards(batch, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        for _ in range(2):
            wrapped(**parts[rank])

    said: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", lambda text, *values: said.append(text % values))
    on_ranks(model, 3, planner((1, 2), 2), run)
    (message,) = said
    assert "10 batch normalisation layers" in message
    assert "slices of 2 to 5 samples" in message
    assert "process's batch, of 3" in message


def test_a_single_value_is_refused_as_plainly():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).mean()

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped(x=numbers(4)["x"][2 * rank : 2 * rank + 2])
        with pytest.raises(ValueError, match=r"'layers\.1' would take its statistics over a single value.*one sample"):
            wrapped(x=numbers(4)["x"][:1])

    on_ranks(Flat().double(), 2, planner((2,), 1), run)
