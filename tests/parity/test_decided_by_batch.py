"""Batches whose values decide what is computed: every batch takes the graph that holds for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.engine import RanncModel
from tests.parity import harness


class Decided(nn.Module):
    """Cuts its input to the longest sample, and takes another branch where any sample has a certain token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.double()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        longest = int((ids > 0).sum(1).max())
        if (ids == 9).any():
            x = x * 1.5
        for layer in self.layers:
            x = x + torch.tanh(layer(x[:, :longest]).mean(1, keepdim=True))
        return (x**2).mean()


def batch(longest: int, branch: bool, seed: int) -> dict[str, torch.Tensor]:
    """Seven samples with up to `longest` tokens. Only the last, on another rank than the first, decides both."""
    ids = torch.zeros(7, 4, dtype=torch.long)
    ids[:, 0], ids[6, :longest] = 1, 2
    ids[6, 0] = 9 if branch else 1
    return {"x": torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), "ids": ids}


BATCHES = [batch(3, False, 0), batch(3, False, 1), batch(4, True, 2), batch(3, False, 3)]


@pytest.mark.parametrize("replicas", [(2, 1), (1, 2, 1)])
def test_graph_follows_the_batch(replicas: tuple[int, ...]) -> None:
    model = Decided()
    parts = [harness.shards(b, sum(replicas)) for b in BATCHES]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        results = []
        for part in parts:
            loss = wrapped(**part[rank])
            loss.backward()
            results.append(harness.result_of(wrapped, [loss.item()]))
            optimizer.zero_grad()
        return results, len(wrapped._runtimes)

    ranks = harness.on_ranks(model, sum(replicas), harness.planner(replicas, 2), run)
    assert [graphs for _, graphs in ranks] == [2] * sum(replicas)
    for step, whole in enumerate(BATCHES):
        wanted = harness.plain(copy.deepcopy(model), whole, 1)
        found = harness.merge([results[step] for results, _ in ranks])
        harness.compare(
            harness.Result(found.losses, found.gradients, {}, []),
            harness.Result(wanted.losses, wanted.gradients, {}, []),
            harness.EXACT,
        )


class Sounds(Decided):
    """Puts the features of sounds of different lengths, and an embedding of their ends, among those of text."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).double()
        self.end = nn.Parameter(torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        places = ids == 2
        features = torch.tanh(self.layers[0](x.flip(1)))
        valid = torch.arange(features.shape[1])[None, :] < places.sum(1, keepdim=True)
        rows = self.layers[1](features[valid])
        h = self.layers[2](x).masked_scatter(places[..., None], rows)
        h[ids == 1] = self.end
        for layer in self.rest:
            h = torch.tanh(layer(h))
        return (h**2).mean()


@pytest.mark.parametrize("replicas", [(1, 2), (1, 1, 2, 1)])
def test_sounds_of_different_lengths(replicas: tuple[int, ...]) -> None:
    # One sample has no sound at all, another has nothing else.
    ids = (torch.arange(4)[None, :] < torch.tensor([0, 1, 2, 4, 3, 1, 2])[:, None]).long() * 2
    ids[[0, 2, 5], -1] = 1
    harness.check(Sounds(), {**BATCHES[0], "ids": ids}, replicas, steps=2)
