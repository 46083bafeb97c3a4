"""Outputs that come as a tuple with one for each sample, such as the features of each image, are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import CaptureError, capture
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.parity import harness

WIDTH, LENGTH, WORDS = 8, 6, 20


class Sight(nn.Module):
    """Gives the same tensor under two names, as encoders without a pooling layer do."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3, WIDTH)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.tanh(self.patches(pixels))
        return {"hidden": features, "pooled": features}


class Body(nn.Module):
    """Counts the words of each sample, which only code that runs as it is can do."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.sight, self.merge = Sight(), nn.Linear(WIDTH, WIDTH)
        self.tokens, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> dict[str, Any]:
        seen = self.sight(pixels)
        x = self.tokens(ids) + self.merge(seen["hidden"])
        images = tuple(seen["pooled"])
        if self.counts:
            numbers = torch.tensor([len(row[row != 0].tolist()) for row in ids])
            x = x + self.positions(numbers).unsqueeze(1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return {"images": images, "hidden": x, "all": seen}


class Reader(nn.Module):
    """What it returns beside the loss: logits, and the features of each image."""

    def __init__(self, counts: bool, looks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.looks = Body(counts), nn.Linear(WIDTH, WORDS), looks
        self.double()

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        made = self.body(ids, pixels)
        logits = self.head(made["hidden"])
        if self.looks:
            logits = logits + torch.stack(made["images"]).mean()
        found = {"logits": logits, "images": made["images"], "features": made["all"]["pooled"]}
        if labels is None:
            return found
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), **found}


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(0, 4, (samples, LENGTH), generator=generator),
        "pixels": torch.randn(samples, LENGTH, 3, generator=generator, dtype=torch.float64),
        "labels": torch.randint(0, WORDS, (samples, LENGTH), generator=generator),
    }


@pytest.mark.parametrize("counts", [False, True], ids=["captured", "as it is"])
@pytest.mark.parametrize("replicas", [(2, 1), (1, 1, 2, 1)], ids=str)
def test_training(replicas: tuple[int, ...], counts: bool):
    harness.check(Reader(counts), batch_of(9), replicas, microbatches=3, steps=2)


@pytest.mark.parametrize("counts", [False, True], ids=["captured", "as it is"])
def test_evaluation_gives_the_others(counts: bool):
    model, batch = Reader(counts), batch_of(7)
    parts = harness.shards(batch, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
        wrapped(**parts[rank])["loss"].backward()
        wrapped.eval()
        with torch.no_grad():
            return wrapped(**parts[rank])

    results = harness.on_ranks(model, 3, harness.planner((1, 2), 2), run)
    model.eval()
    for rank, found in enumerate(results):
        wanted = model(**parts[rank])
        assert found.keys() == wanted.keys()
        for name in ("loss", "logits", "features"):
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-9)
        with pytest.raises(TypeError, match=r"'images(\.0)?' .* is not returned"):
            torch.stack(list(found["images"]))


@pytest.mark.parametrize("counts", [False, True], ids=["captured", "as it is"])
def test_a_loss_outside_does_not_need_them(counts: bool):
    batch = batch_of(6)
    graph = capture(Reader(counts).train(), {k: v for k, v in batch.items() if k != "labels"}, loss="split")
    assert set(graph.outputs) == {"logits", "features"}
    assert {path.partition(".")[0] for path in graph.left_out} == {"images"}


def test_who_looks_into_them_is_told():
    with pytest.raises(CaptureError, match="how many tensors 'body' gives"):
        capture(Reader(counts=True, looks=True).train(), batch_of(6))


def test_nothing_else_is_returned():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.layer(x))

    with pytest.raises(CaptureError, match="how many outputs"):
        capture(Rows().train(), {"x": torch.randn(6, 3)}, loss="split")


class Told(nn.Module):
    """Returns what is no tensor, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
        self.double()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        y = self.layers(x) * attention_mask.unsqueeze(-1)
        told = {"name": "plain", "number": 5, "flag": True, "nothing": None, "samples": len(x)}
        return {"loss": (y - labels.view(-1, 1, 1)).square().mean(), "y": y, **told}


@pytest.mark.parametrize("longer", [0, 1], ids=["same lengths", "padded"])
def test_what_is_no_tensor(longer: int):
    """Numbers may be lengths, which are those of the padded batch."""
    shapes = [(2, 4), (3, 4 + longer)]
    parts = [
        {"x": torch.ones(*s, 3).double(), "attention_mask": torch.ones(s).long(), "labels": torch.arange(s[0]) * 1.0}
        for s in shapes
    ]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
        wrapped(**{k: v[:, :4] if v.dim() > 1 else v for k, v in parts[rank].items()})["loss"].backward()
        wrapped.eval()
        with torch.no_grad():
            return wrapped(**parts[rank])

    config = RanncConfig(length_multiple=1, pad={"x": 0, "attention_mask": 0})
    for rank, found in enumerate(harness.on_ranks(Told(), 2, harness.planner((1, 1), 2), run, config)):
        assert (found["name"], found["flag"], found["nothing"]) == ("plain", True, None)
        assert found["y"].shape == (*shapes[rank], 3)
        with pytest.raises(TypeError, match=r"'samples' .* depends on their number"):
            float(found["samples"])
        if longer and rank == 0:
            with pytest.raises(TypeError, match="which were padded"):
                float(found["number"])
        else:
            assert found["number"] == 5
