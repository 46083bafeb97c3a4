"""Modules that run as they are, given what is handed on only while a model is exported: a mask that masks nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import capture
from tests.parity.harness import check
from tests.parity.models import Batch

WIDTH, LENGTH = 6, 4


class Layer(nn.Module):
    """Clamps what has overflowed: a branch on activations."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.dense(x if mask is None else x * mask).tanh()
        return x if torch.isfinite(x).all() else x.clamp(-1, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(4)), nn.Linear(WIDTH, 3)

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor | None:
        traced = torch.compiler.is_exporting() and torch.compiler.is_compiling()
        return attention_mask[..., None].to(torch.float64) if traced or not attention_mask.all() else None

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mask = self.mask(attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return functional.cross_entropy(self.head(x).mean(1), labels)


class Restless(Model):
    """Its code cannot be captured either, and hands on what it does where nothing is exported."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x[0, 0].sum() == x[0, 0].sum() else x + 0, attention_mask, labels)


def subject(kind: type[nn.Module], padded: bool = False) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    numbers, mask = torch.randn(7, LENGTH, WIDTH, dtype=torch.float64), torch.ones(7, LENGTH, dtype=torch.long)
    if padded:
        mask[1::2, -1] = 0
    return kind().double().train(), {"x": numbers, "attention_mask": mask, "labels": torch.arange(7) % 3}


@pytest.mark.parametrize(
    ("kind", "padded", "replicas"), [(Model, False, (1, 1, 1, 1)), (Restless, True, (1, 2))], ids=str
)
def test_gradients_are_those_of_plain_training(kind: type[nn.Module], padded: bool, replicas: tuple[int, ...]):
    model, batch = subject(kind, padded)
    graph = capture(model, batch)
    assert {key.partition("#")[0] for key in graph.opaque} >= {f"layers.{i}" for i in range(4)}
    check(model, batch, replicas, steps=1)
