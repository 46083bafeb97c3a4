"""Branches on draws from Python and NumPy: refused, unless no draw decides; and hooks on tensors, which run."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import CaptureError, capture
from tests.parity import harness

DRAWS: dict[str, Callable[[], float]] = {
    "random.random": lambda: random.random(),
    "random.uniform": lambda: random.uniform(0, 1),
    "numpy.random.rand": lambda: float(numpy.random.rand(1)[0]),
    "numpy.random.uniform": lambda: numpy.random.uniform(0, 1),
    "numpy.random.random": lambda: numpy.random.random(),
}


class Dropped(nn.Module):
    """Leaves layers out at random."""

    def __init__(self, draw: Callable[[], float], rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.draw, self.rate = draw, rate
        self.double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not (self.training and self.draw() < self.rate):
                x = x + torch.tanh(layer(x))
        return functional.cross_entropy(x, labels)


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(samples, 4, dtype=torch.float64), "labels": torch.arange(samples) % 4}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_that_decide_are_refused_whatever_is_drawn(name: str):
    for seed in range(3):
        random.seed(seed)
        numpy.random.seed(seed)
        with pytest.raises(CaptureError, match="draws random numbers from Python or NumPy"):
            capture(Dropped(DRAWS[name], 0.001).train(), batch_of(6))


@pytest.mark.parametrize("name", DRAWS)
def test_draws_that_do_not_decide(name: str):
    harness.check(Dropped(DRAWS[name], 0.0), batch_of(6), (1, 1), steps=1)


def test_other_draws_are_refused_and_the_generators_stay():
    before = random.getstate()
    with pytest.raises(CaptureError, match="draws random numbers from Python or NumPy"):
        capture(Dropped(lambda: random.choice([0.5, 0.6]), 0.1).train(), batch_of(6))
    assert random.getstate() == before


class Hooked(nn.Module):
    """Doubles a gradient by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layer(x))
        if x.requires_grad:
            x.register_hook(lambda gradient: 2 * gradient)
        return x


class WithHook(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.layers = inside, nn.ModuleList([nn.Linear(4, 4), Hooked(), nn.Linear(4, 4)])
        self.double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        if not self.inside:
            x.register_hook(lambda gradient: 2 * gradient)
        return functional.cross_entropy(x, labels)


def test_hooks_on_tensors_run():
    harness.check(WithHook(inside=True), batch_of(6), (2,), steps=1)


def test_hooks_that_a_graph_would_lose_are_refused():
    with pytest.raises(CaptureError, match="a hook on a tensor"):
        capture(WithHook(inside=False).train(), batch_of(6), dtype=torch.bfloat16)
