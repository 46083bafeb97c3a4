"""Models that compute something else where they are traced are captured as if they were not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.engine import RanncModel
from tests.parity import harness


class Asks(nn.Module):
    """Leaves a mask out that hides no position, unless it is traced; but the mask hides the future as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.double()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = None
        if torch.compiler.is_exporting() or not attention_mask.all():
            mask = torch.ones(4, 4, dtype=torch.bool).tril() & (attention_mask[:, None] > 0)
        for layer in self.layers:
            scores = x @ layer(x).mT
            scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
            x = x + scores.softmax(-1) @ x
        return (x**2).mean()


def batch(padded: bool, seed: int) -> dict[str, torch.Tensor]:
    """Seven samples. Only the last, on another rank than the first, is padded."""
    mask = torch.ones(7, 4, dtype=torch.long)
    mask[6, 3:] = 0 if padded else 1
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(7, 4, 6, generator=generator, dtype=torch.float64), "attention_mask": mask}


@pytest.mark.parametrize(("replicas", "first"), [((2, 1), True), ((1, 1, 2, 1), False)])
def test_masks_are_left_out_where_plain_training_does(replicas: tuple[int, ...], first: bool) -> None:
    """`first`: whether the first batch is padded; then the graph is wrong for the second one only."""
    model = Asks()
    batches = [batch(first, 0), batch(not first, 1), batch(first, 2)]
    parts = [harness.shards(b, sum(replicas)) for b in batches]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        results = []
        for part in parts:
            loss = wrapped(**part[rank])
            loss.backward()
            results.append(harness.result_of(wrapped, [loss.item()]))
            optimizer.zero_grad()
        return results

    ranks = harness.on_ranks(model, sum(replicas), harness.planner(replicas, 2), run)
    for step, whole in enumerate(batches):
        wanted = harness.plain(model, whole, 1)
        found = harness.merge([results[step] for results in ranks])
        harness.compare(
            harness.Result(found.losses, found.gradients, {}, []),
            harness.Result(wanted.losses, wanted.gradients, {}, []),
            harness.EXACT,
        )
