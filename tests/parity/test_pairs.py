"""Models with two towers, whose outputs compare the samples of a batch: trained from the embeddings of each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import CaptureError, capture
from rannc_hf.capture.outputs import told_left_out
from rannc_hf.engine.model import RanncModel
from tests.parity.harness import EXACT, compare, on_ranks, planner, shards
from tests.parity.harness import check as check_fused
from tests.parity.models import Batch
from tests.parity.test_split import SPLIT, data_parallel, split

WIDTH = 6


class Layer(nn.Module):
    """Its gain is a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.dense(x).tanh()


class Towers(nn.Module):
    """What CLIP is: two encoders, and the product of each text with each image."""

    def __init__(self, returns_loss: bool = False) -> None:
        super().__init__()
        self.texts, self.images = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        self.logit_scale, self.returns_loss = nn.Parameter(torch.tensor(1.5)), returns_loss

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.texts:
            text = layer(text)
        for layer in self.images:
            image = layer(image)
        logits = self.logit_scale.exp() * text @ image.t()
        made = {"logits_per_text": logits, "logits_per_image": logits.t(), "text_embeds": text, "image_embeds": image}
        if self.returns_loss:
            made["loss"] = functional.cross_entropy(logits, torch.arange(len(text)))
        return made


def contrastive(outputs: Any, batch: Batch) -> torch.Tensor:
    scores = outputs["text_embeds"] @ outputs["image_embeds"].t()
    return functional.cross_entropy(scores, torch.arange(len(scores)))


def subject(samples: int = 9) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    fields = {name: torch.randn(samples, WIDTH, dtype=torch.float64) for name in ("text", "image")}
    return Towers().double().train(), fields


@pytest.mark.parametrize("replicas", [(1, 2), (1, 1, 1, 1)], ids=str)
def test_a_contrastive_loss_of_each_rank_from_the_embeddings(replicas: tuple[int, ...]):
    model, batch = subject()
    parts = shards(batch, sum(replicas))
    result = split(model, parts, parts, contrastive, 2, planner(replicas, 2, "gpipe"), SPLIT)
    compare(result, data_parallel(model, parts, parts, contrastive, 2), EXACT)


def test_outputs_that_are_left_out_say_so():
    model, batch = subject()
    (told,) = told_left_out(capture(model, batch, loss="split"))
    assert "logits_per_text, logits_per_image" in told and "No gradient reaches logit_scale" in told
    parts = shards(batch, 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        return wrapped(**parts[rank]), wrapped.eval()(**parts[rank])

    results = on_ranks(model, 2, planner((1, 1), 2, "gpipe"), run, SPLIT)
    for outputs in (found for each in results for found in each):
        assert outputs["text_embeds"].shape[1] == WIDTH
        with pytest.raises(TypeError, match="'logits_per_text' compares all samples"):
            functional.cross_entropy(outputs["logits_per_text"], torch.arange(5))
        with pytest.raises(TypeError, match="'logits_per_image' compares all samples"):
            outputs["logits_per_image"] * 2


def test_a_loss_of_the_model_that_compares_samples_is_refused():
    _, batch = subject()
    with pytest.raises(CaptureError, match="samples x samples"):
        capture(Towers(returns_loss=True).double(), batch)


class Gains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            text = layer(text)
        return functional.mse_loss(text, image)


@pytest.mark.parametrize("replicas", [(2, 1), (1, 1, 1, 1)], ids=str)
def test_parameters_without_dimensions(replicas: tuple[int, ...]):
    torch.manual_seed(0)
    check_fused(Gains().double().train(), subject()[1], replicas, steps=2)
