"""Images as patches of all samples one after the other, which forward cuts out by their grids."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.engine import RanncModel
from tests.parity import harness

WIDTH, SAMPLES, IMAGE, TEXT = 8, 7, 5, 6


class Sight(nn.Module):
    """Attends within each image, whose patches it cuts out by the grids."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.project, self.merge = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        parts = self.patch(pixels).split(grid.prod(-1).tolist())
        x = torch.cat([torch.softmax(part @ part.T, -1) @ self.project(part) for part in parts])
        return self.merge(x.view(-1, 2 * WIDTH))


class Seeing(nn.Module):
    """Puts a pair of patches in the place of each token that stands for an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sight = Sight()
        self.tokens = nn.Embedding(9, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.head = nn.Linear(WIDTH, 9)
        self.double()

    def forward(
        self, pixels: torch.Tensor, grid: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        patches = self.sight(pixels, grid)
        x = self.tokens(input_ids).masked_scatter((input_ids == IMAGE)[..., None], patches)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits, "patches": patches}
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def batch(grids: list[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Samples with an image each; tokens that stand for its patches are at other places in each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (len(grids), TEXT), generator=generator)
    for row, (height, width) in zip(ids, grids):
        row[torch.randperm(TEXT, generator=generator)[: height * width // 2]] = IMAGE
    patches = sum(height * width for height, width in grids)
    return {
        "pixels": torch.randn(patches, 3, generator=generator, dtype=torch.float64),
        "grid": torch.tensor(grids),
        "input_ids": ids,
        "labels": torch.randint(0, 9, (len(grids), TEXT), generator=generator),
    }


EVEN, OTHER = [(2, 4)] * SAMPLES, [(4, 2)] * SAMPLES
UNEVEN = [(2, 2), (2, 6), (2, 4), (2, 4), (1, 6), (5, 2), (2, 4)]
"""As many patches in all, but not in each sample."""


@pytest.mark.parametrize("replicas", [(2, 1), (1, 1, 2, 1)], ids=str)
def test_patches_of_all_samples(replicas: tuple[int, ...]) -> None:
    harness.check(Seeing(), batch(EVEN), replicas, steps=1)


def test_other_grids() -> None:
    """Grids of a later batch are taken if all are alike; others never give anything but an error, on all ranks.

    The last batch leaves a rank without samples.
    """
    model, batches = Seeing(), [batch(EVEN), batch(EVEN, 1), batch(OTHER, 2), batch(UNEVEN), batch(EVEN[:2], 3)]
    parts = [harness.shards(b, 3) for b in batches]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> list[Any]:
        results = []
        for number, part in enumerate(parts):
            if number == 3:
                with pytest.raises(ValueError):
                    wrapped(**part[rank])
                continue
            loss = wrapped(**part[rank])["loss"]
            loss.backward()
            results.append(harness.result_of(wrapped, [loss.item()]))
            optimizer.zero_grad()
        return results

    ranks = harness.on_ranks(model, 3, harness.planner((1, 2), 2), run)
    for index, own in enumerate([batches[n] for n in (0, 1, 2, 4)]):
        found, wanted = harness.merge([rank[index] for rank in ranks]), harness.plain(copy.deepcopy(model), own, 1)
        harness.compare(
            harness.Result(found.losses, found.gradients, {}, []),
            harness.Result(wanted.losses, wanted.gradients, {}, []),
            harness.EXACT,
        )


def test_outputs_with_rows() -> None:
    """Evaluation gives each rank the rows of its own samples."""
    model, whole = Seeing().eval(), {k: v for k, v in batch(EVEN).items() if k != "labels"}
    wanted = model(**whole)
    parts = harness.shards(whole, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        wrapped.partition(**harness.shards(batch(EVEN), 3)[rank])
        wrapped.eval()
        with torch.no_grad():
            return wrapped(**parts[rank])

    found = harness.on_ranks(model.train(), 3, harness.planner((1, 2), 2), run)
    for name, value in wanted.items():
        torch.testing.assert_close(torch.cat([f[name] for f in found]), value)
