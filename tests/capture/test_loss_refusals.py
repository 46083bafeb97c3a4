"""Losses that do not add up over slices of a batch are refused; the message names the operation and its module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import WIDTH, numbers

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Head(nn.Module):
    """The loss is computed in a module of its own, which messages must name."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.loss = loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.dense(x).tanh(), y)


class Model(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = Head(loss)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x), y)


REFUSED: dict[str, tuple[str, Loss]] = {
    "square of a mean": ("aten.pow", lambda h, y: F.mse_loss(h, y) ** 2),
    "root of a mean": ("aten.sqrt", lambda h, y: F.mse_loss(h, y).sqrt()),
    "exponential of a mean": ("aten.exp", lambda h, y: F.mse_loss(h, y).exp()),
    "product of two means": ("aten.mul.Tensor", lambda h, y: h.mean() * F.mse_loss(h, y)),
    "ratio of two means": ("aten.div.Tensor", lambda h, y: F.mse_loss(h, y) / h.abs().mean()),
    "divided by a mean": ("aten.(reciprocal|div)", lambda h, y: y.shape[1] / h.exp().mean()),
    "rounded": ("aten.div.Tensor_mode|aten.div ", lambda h, y: torch.div(h.mean(), 2, rounding_mode="floor")),
    "clamped": ("aten.clamp", lambda h, y: F.mse_loss(h, y).clamp(max=1.0)),
    "largest of two means": ("aten.maximum", lambda h, y: torch.maximum(h.mean(), F.mse_loss(h, y))),
    "chosen by a mean": ("aten.gt", lambda h, y: torch.where(h.mean() > 0, h.mean(), h.sum())),
    "cast to whole numbers": ("aten.to", lambda h, y: h.sum().long().double() + h.mean()),
    "maximum over the batch": ("aten.max ", lambda h, y: h.max()),
    "maximum over dimension 0": ("aten.max ", lambda h, y: h.max(0).values.mean()),
    "product over the batch": ("aten.prod", lambda h, y: h.prod(0).sum()),
    "norm over the batch": ("aten.(linalg_vector_)?norm", lambda h, y: h.norm()),
    "variance over the batch": ("aten.var", lambda h, y: h.var(0).mean()),
    "logsumexp over the batch": ("aten.logsumexp", lambda h, y: h.logsumexp(0).mean()),
    "correlation": ("aten.(matmul|mm)", lambda h, y: (h.t() @ y).diagonal().sum()),
    "one sample": ("aten.select", lambda h, y: h[0].sum()),
    "a sample each": ("getitem of aten.unbind", lambda h, y: h.unbind(0)[1].sum()),
    "mean and deviation": ("aten.std", lambda h, y: ((h - y.mean(0)) / y.std(0)).mean()),
    "centred": ("values of each sample", lambda h, y: (h - h.mean(0)).pow(2).mean()),
    "scaled by a mean": ("by a value of each sample", lambda h, y: (h * h.mean(0)).mean()),
    "contrastive": ("samples x samples", lambda h, y: F.cross_entropy(h @ y.t(), torch.arange(h.shape[0]))),
    "labels by parameters": ("targets or class weights", lambda h, y: F.cross_entropy(y, h.argmax(-1))),
    "maximum of the labels": ("aten.max", lambda h, y: F.mse_loss(h, y) / y.max()),
    "one over the batch size": ("write `x / batch_size`", lambda h, y: h.sum() * (1 / len(h))),
    "half of the batch size": ("depends on the number of samples", lambda h, y: h.sum() / (len(h) // 2)),
    "logarithm of the batch size": (
        "depends on the number of samples",
        lambda h, y: h.sum() / torch.tensor(len(h)).log().item(),
    ),
    "size to the power": ("depends on the number of samples|cannot be split", lambda h, y: 2 ** len(h) * h.mean()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    message, loss = REFUSED[name]
    with pytest.raises(CaptureError, match=message) as error:
        capture(Model(loss).double(), {"x": numbers(), "y": numbers(seed=1)})
    assert "head" in str(error.value) or "number of samples" in str(error.value), error.value
    assert "test_loss_refusals.py" in str(error.value) or "number of" in str(error.value), error.value


def test_numbers_that_change_from_call_to_call_are_refused():
    calls = iter(range(100))

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (h * torch.tensor([0.5, float(next(calls)), 1.0, 1.0, 1.0, 1.0])).mean()

    with pytest.raises(CaptureError, match="from call to call"):
        capture(Model(loss).double(), {"x": numbers(), "y": numbers(seed=1)})
