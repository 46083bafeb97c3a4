"""Batches that differ from the first in what may be asked of a batch: masks, lengths, order, what samples share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.parity import harness
from tests.parity.harness import follow
from tests.parity.models import CASES

WIDTH, WORDS = 8, 20
Batch = Mapping[str, Any]


class Reader(nn.Module):
    """Reads text in a way that its `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.tokens, self.head = kind, nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.double()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        seen = attention_mask[:, None, :] > 0
        if self.kind == "segments":
            seen = seen & (attention_mask[:, None, :] == attention_mask[:, :, None])
        for layer in self.layers:
            query, key, value = layer(x).chunk(3, -1)
            x = x + functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        if self.kind == "recurrent":
            x = x.flip(1)
            x = x + self.recurrent(x)[0].flip(1)
        if self.kind == "mean":
            x = x + x.mean(1, keepdim=True)
        if self.kind == "last":
            x = x + x[:, -1:]
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def text(samples: int, length: int, mask: torch.Tensor | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, WORDS, (samples, length), generator=generator),
        "attention_mask": torch.ones(samples, length, dtype=torch.long) if mask is None else mask,
        "labels": torch.randint(0, WORDS, (samples, length), generator=generator),
    }


def test_masks_that_number_segments():
    ones = torch.ones(4, 6, dtype=torch.long)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]]).repeat(4, 1)
    padded = segments.clone()
    padded[0, 5] = 0
    batches = [text(4, 6, mask, seed) for seed, mask in enumerate([padded, segments, ones])]
    follow(Reader("segments"), batches)
    follow(Reader("segments"), batches[1:])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("rannc_hf.engine.batch.logger.warning", lambda text, *values: found.append(text % values))
    return found


@pytest.mark.parametrize("kind", ["recurrent", "mean", "last"])
def test_lengths_are_not_rounded_up_where_that_changes_something(kind: str, said: list[str]):
    follow(Reader(kind), [text(4, 6), text(4, 9, seed=1)], config=RanncConfig())
    (line,) = said
    assert "lengths are not rounded up to multiples of 32" in line


def test_lengths_are_rounded_up_where_it_changes_nothing(said: list[str]):
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = 0
    follow(Reader("plain"), [text(4, 6, mask), text(4, 9, seed=1)], config=RanncConfig())
    assert not said


def test_fields_in_another_order_on_one_rank():
    batch = CASES["bert"].batch_as(4)
    first, second = harness.shards(batch, 2)
    follow(CASES["bert"].model(), [batch], [[first, dict(reversed(second.items()))]])


class Weighted(nn.Module):
    """Takes a weight: one for all samples, or one of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.double()

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, scale: float | None = 2.0
    ) -> torch.Tensor:
        losses = functional.cross_entropy(self.layers(x), labels, reduction="none")
        if weight.dim() > 1:
            weight = weight.sum(-1)
        return (losses * weight).mean() * (3 if scale is None else scale)


def weighted(samples: int, weight: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.arange(samples) % WIDTH, "weight": weight.double()}


def parted(batch: Batch) -> list[Batch]:
    """For two ranks; what samples share goes to both."""
    whole = {k: v for k, v in batch.items() if v.dim() and len(v) == len(batch["x"])}
    return [{**batch, **part} for part in harness.shards(whole, 2)]


def test_a_field_with_samples_and_one_without():
    batches = [weighted(4, torch.tensor(0.5)), weighted(4, torch.rand(4), 1), weighted(4, torch.tensor(2.0), 2)]
    follow(Weighted(), batches, [parted(batch) for batch in batches])


def test_what_samples_share_where_each_rank_has_one():
    batches = [weighted(4, torch.rand(1, 3)), weighted(2, torch.rand(1, 3), 1)]
    follow(Weighted(), batches, [parted(batch) for batch in batches])


def test_what_samples_share_differs_between_ranks():
    parts = [weighted(2, torch.tensor(float(rank))) for rank in range(2)]
    with pytest.raises(ValueError, match="field 'weight' has no samples, and ranks 0 and 1 pass other values"):
        follow(Weighted(), [parts[0]], [parts])


def test_none_where_it_is_not_the_default():
    batch = weighted(4, torch.rand(4))
    parts = harness.shards(batch, 2)
    follow(Weighted(), [batch, {**batch, "scale": None}], [parts, [{**part, "scale": None} for part in parts]])


def test_outputs_of_other_lengths():
    """Of T5, whose logits are as long as the labels: (text, labels) on the second rank; the first has 8 of both."""
    model, lengths = CASES["t5"].model(), [(8, 6), (6, 8)]

    def batch(length: int, labels: int) -> dict[str, torch.Tensor]:
        made = text(2, length, seed=length)
        return {**made, "labels": torch.randint(1, 60, (2, labels), generator=torch.Generator().manual_seed(1))}

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> list[torch.Tensor]:
        wrapped.partition(**batch(8, 8))
        wrapped.eval()
        with torch.no_grad():
            return [wrapped(**batch(*(pair if rank else (8, 8)))).logits for pair in lengths]

    _, found = harness.on_ranks(model, 2, harness.planner((1, 1), 2), run)
    for logits, pair in zip(found, lengths):
        torch.testing.assert_close(logits, model.eval()(**batch(*pair)).logits, rtol=0, atol=1e-6)
