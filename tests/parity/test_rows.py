"""Stages between which samples travel as several rows each: choices, windows, and batches joined with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import capture
from rannc_hf.engine import RanncModel
from tests.parity.harness import EXACT, check, compare, difference, loss_of, on_ranks, planner, shards
from tests.parity.models import Batch
from tests.parity.test_split import SPLIT, data_parallel, split

WIDTH, CHOICES = 6, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dense(x).tanh()


class Choices(nn.Module):
    """Each choice of a sample is a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(4)), nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.view(-1, WIDTH)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x).view(-1, CHOICES)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits, "rows": x}


class Joined(Choices):
    """Twice all samples, one after another; each time with a row for each choice."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.cat([x.view(-1, WIDTH), x.flip(-1).reshape(-1, WIDTH)])
        for layer in self.layers:
            x = layer(x)
        one, other = self.head(x).view(2, -1, CHOICES).unbind()
        return {"loss": functional.cross_entropy(one * other.sigmoid(), labels), "logits": one, "rows": x}


class Turned(Joined):
    """The rows are in the second dimension."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.cat([x, -x]).flatten(0, 1).expand(2, -1, -1)
        for layer in self.layers:
            x = layer(x)
        one, other = self.head(x).mean(0).view(2, -1, CHOICES).unbind()
        return {"loss": functional.cross_entropy(one * other.sigmoid(), labels), "logits": one, "rows": x}


def subject(kind: type[nn.Module], samples: int = 9) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    numbers = torch.randn(samples, CHOICES, WIDTH, dtype=torch.float64)
    return kind().double().train(), {"x": numbers, "labels": torch.randint(CHOICES, (samples,))}


KINDS = pytest.mark.parametrize("kind", [Choices, Joined, Turned])


@pytest.mark.parametrize(
    ("kind", "replicas"), [(Choices, (1, 3, 2)), (Joined, (1, 3, 2)), (Turned, (1, 3, 2)), (Joined, (1, 1, 1, 1))]
)
def test_training(kind: type[nn.Module], replicas: tuple[int, ...]):
    model, batch = subject(kind)
    check(model, batch, replicas, steps=2)


@KINDS
def test_outputs_are_each_ranks_own(kind: type[nn.Module]):
    model, batch = subject(kind)
    parts = shards(batch, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss_of(wrapped(**parts[rank])).backward()
        wrapped.eval()
        with torch.no_grad():
            return wrapped(**parts[rank])

    for part, found in zip(parts, on_ranks(model, 3, planner((1, 2), 2), run)):
        wanted = model(**part)
        for name in ("logits", "rows"):
            assert difference(found[name], wanted[name], 1e-9) < 1e-9


@KINDS
def test_a_loss_of_the_script(kind: type[nn.Module]):
    model, batch = subject(kind)
    parts = shards(batch, 3)

    def loss(outputs: Any, own: Batch) -> torch.Tensor:
        weights = torch.linspace(0, 1, outputs["rows"].numel(), dtype=torch.float64)
        return (outputs["rows"].reshape(-1).pow(2) * weights).mean() + outputs["logits"].pow(2).mean()

    result = split(model, parts, parts, loss, 2, planner((1, 2), 2, "gpipe"), SPLIT)
    compare(result, data_parallel(model, parts, parts, loss, 2), EXACT)


@pytest.mark.parametrize(("kind", "rows", "runs"), [(Choices, CHOICES, 1), (Joined, 2 * CHOICES, 2)])
def test_rows_are_cut_between_layers(kind: type[nn.Module], rows: int, runs: int):
    model, batch = subject(kind)
    graph = capture(model, batch)
    crossing = [graph.values[name] for block in graph.blocks for name in block.inputs]
    assert len(graph.blocks) >= 4 and all((v.rows, v.runs) == (rows, runs) for v in crossing)
