"""Training runs that stop and go on, all ranks in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rannc_hf.checkpoint import load, save
from rannc_hf.engine import RanncModel
from tests.parity.harness import Planner, loss_of, on_ranks, optimizer_of, planner, shards

Batch = dict[str, torch.Tensor]
State = dict[str, torch.Tensor]


class Tiny(nn.Module):
    """Small and quick to capture; with a tied weight, a buffer and a frozen parameter, and called like Transformers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(8, generator=generator))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.layers[1].bias.requires_grad_(False)
        self.double()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Batch:
        hidden = self.embedding(ids) + self.shift
        for layer in self.layers:
            hidden = hidden + self.dropout(torch.tanh(layer(hidden)))
        logits = self.head(hidden)
        result = {"logits": logits}
        if labels is not None:
            result["loss"] = nn.functional.cross_entropy(logits.view(-1, 20), labels.view(-1))
        return result


def batches(samples: int = 8, count: int = 4) -> list[Batch]:
    """Different batches for `Tiny`."""
    generator = torch.Generator().manual_seed(2)
    return [
        {key: torch.randint(20, (samples, 6), generator=generator) for key in ("ids", "labels")} for _ in range(count)
    ]


@dataclass
class Stage:
    """Some steps of training under one plan."""

    replicas: Sequence[int]
    steps: int
    shard: str = "none"
    load: Path | None = None
    save: Path | None = None
    late: bool = False
    """Load after a first batch, not before."""
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = optimizer_of

    def planner(self) -> Planner:
        return planner(self.replicas, 2, "1f1b", "none", self.shard)

    def train(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[list[float], State, float]:
        """Losses, the whole state at the end and the learning rate."""
        ranks = sum(self.replicas)
        results = on_ranks(
            model, ranks, self.planner(), lambda *own: self.body(*own, batches), make_optimizer=self.make_optimizer
        )
        assert all(losses == results[0][0] for losses, _, _ in results)
        return results[0]

    def body(
        self, model: RanncModel, optimizer: torch.optim.Optimizer, rank: int, batches: Sequence[Batch]
    ) -> tuple[list[float], State, float]:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        parts = [shards(batch, model.transport.world_size)[rank] for batch in batches]
        done = 0
        if self.late:
            loss_of(model(**parts[0])).backward()
            optimizer.step()
            optimizer.zero_grad()
        if self.load is not None:
            done = load(self.load, model, schedulers=[scheduler])["done"]
        losses = []
        for part in parts[done : done + self.steps]:
            loss = loss_of(model(**part))
            loss.backward()
            model.clip_grad_norm_(0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if self.save is not None:
            save(self.save, model, schedulers=[scheduler], extra={"done": done + self.steps})
        return losses, model.full_state_dict(), optimizer.param_groups[0]["lr"]


def other_weights(model: nn.Module) -> nn.Module:
    """The same model from another start: whatever a checkpoint does not restore is seen."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.125)
    return model


def worst(found: State, wanted: State) -> float:
    """Largest difference between two states."""
    assert found.keys() == wanted.keys()
    return max(float((found[k] - v).abs().max()) for k, v in wanted.items() if v.is_floating_point())


def optimizer_kind(kind: str) -> Any:
    """A function that makes this kind of optimizer, in two groups."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
        "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
        "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, eps=1e-4),
    }

    def make(model: nn.Module) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        return makers[kind]([{"params": [p for n, p in named if ("bias" in n) == bias]} for bias in (False, True)])

    return make
