"""Losses of slices of a batch add up to the loss of the batch; what cannot add up is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rannc_hf.capture import CaptureError, capture
from tests.capture.steps import check_split

Loss = Callable[..., torch.Tensor]


class Head(nn.Module):
    """A layer and a loss of its scores."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()
        self.register_buffer("weight", torch.tensor([0.5, 1.0, 3.0]).double())
        self.loss = loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self, self.layer(x), y)


def batch(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, 4, generator=generator).double()
    if kind == "classes":
        y = torch.randint(0, 3, (7, 5), generator=generator)
        y[0] = y[3, :3] = -100
        y[5:] = -100  # the last slice has no labels at all
    else:
        y = torch.rand(7, 5, 3, generator=generator).double()
    return {"x": x, "y": y}


def flat(s: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return s.view(-1, 3), y.view(-1)


ADDITIVE: dict[str, tuple[str, Loss]] = {
    "cross_entropy": ("classes", lambda m, s, y: F.cross_entropy(*flat(s, y))),
    "weighted": ("classes", lambda m, s, y: F.cross_entropy(*flat(s, y), weight=m.weight)),
    "smoothed": ("classes", lambda m, s, y: F.cross_entropy(*flat(s, y), label_smoothing=0.1)),
    "summed": ("classes", lambda m, s, y: F.cross_entropy(*flat(s, y), reduction="sum")),
    "by_count": ("classes", lambda m, s, y: F.cross_entropy(*flat(s, y), reduction="sum") / (y != -100).sum()),
    "by_samples": ("classes", lambda m, s, y: F.cross_entropy(*flat(s, y), reduction="sum") / s.shape[0]),
    "probabilities": ("floats", lambda m, s, y: F.cross_entropy(s.view(-1, 3), y.view(-1, 3))),
    "mse": ("floats", lambda m, s, y: F.mse_loss(s, y)),
    "l1": ("floats", lambda m, s, y: F.l1_loss(s, y)),
    "bce": ("floats", lambda m, s, y: F.binary_cross_entropy_with_logits(s, y)),
    "mean": ("floats", lambda m, s, y: ((s - y) ** 2).mean()),
    "mean_of_dims": ("floats", lambda m, s, y: ((s - y) ** 2).mean((0, 1)).sum()),
    "masked_mean": ("floats", lambda m, s, y: (((s - y) ** 2) * (y > 0.5)).sum() / (y > 0.5).sum()),
    "two_losses": ("floats", lambda m, s, y: 0.3 * F.mse_loss(s, y) + F.l1_loss(s[:, 0], y[:, 0]) / 2),
    "penalty": ("floats", lambda m, s, y: F.mse_loss(s, y) + 0.1 * (m.layer.weight**2).sum()),
    "constant": ("floats", lambda m, s, y: F.mse_loss(s, y) + 2.5),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_slices_add_up(name: str):
    kind, loss = ADDITIVE[name]
    check_split(Head(loss), batch(kind), (1, 4, 2), tolerance=1e-7 if name == "constant" else 1e-10)


REFUSED: dict[str, tuple[Loss, str]] = {
    "square": (lambda m, s, y: F.mse_loss(s, y) ** 2, "pow.* is not linear"),
    "product": (lambda m, s, y: F.mse_loss(s, y) * s.mean(), "mul.* is not linear"),
    "largest": (lambda m, s, y: (s - y).abs().max(), "max.* computes one value from all samples"),
    "contrastive": (lambda m, s, y: (s[:, 0] @ y[:, 0].T).diagonal().mean(), "samples x samples"),
    "across": (lambda m, s, y: (s.softmax(0) * y).mean(), "softmax.* works across the samples"),
    "whole_batch": (lambda m, s, y: F.mse_loss(s, y / y.max()), "max.* computes one value from all samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_add_up_is_refused(name: str):
    loss, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(Head(loss), batch("floats"))


def test_batch_normalisation_is_refused_by_name():
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.layer(x)).square().mean()

    with pytest.raises(CaptureError, match=r"norm.*GroupNorm or LayerNorm"):
        capture(Normalised(), {"x": torch.zeros(4, 4)})


def test_a_loss_of_bf16_scores_is_computed_in_fp32():
    graph = capture(Head(ADDITIVE["cross_entropy"][1]), batch("classes") | {"x": torch.zeros(7, 5, 4)}, dtype=None)
    assert graph.loss is not None and graph.values[graph.loss].dtype == torch.float64
    model = Head(ADDITIVE["cross_entropy"][1]).float()
    model.weight = model.weight.bfloat16()
    data = batch("classes")
    low = capture(model, {**data, "x": data["x"].bfloat16()}, dtype=torch.bfloat16)
    assert low.loss is not None and low.values[low.loss].dtype == torch.float32
