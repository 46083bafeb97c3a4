"""A model that computes something else while it is captured is refused before it trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.capture import CaptureError, capture
from rannc_hf.capture.numbers import check_numbers


class Net(nn.Module):
    """Leaves a mask out unless it is exported, as Transformers does with masks that mask nothing."""

    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.honest = honest
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.dropout(torch.tanh(self.norm(self.first(x))))
        if self.honest or torch.compiler.is_compiling():
            hidden = hidden * (torch.arange(6) < 3)
        return {"loss": nn.functional.cross_entropy(self.last(hidden), labels)}


def checked(model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    torch.manual_seed(0)
    batch: dict[str, Any] = {"x": torch.randn(4, 6, dtype=dtype), "labels": torch.tensor([0, 1, -100, 2])}
    before = copy.deepcopy(model.state_dict())
    assert check_numbers(capture(model, batch), model, batch, None), "it was compared"
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if not v.is_meta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_left_out_unless_exported_is_refused(dtype: torch.dtype):
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match="computes something else while it is captured"):
        checked(Net(honest=False).to(dtype), dtype)
    checked(Net(honest=True).to(dtype), dtype)


class OtherBackward(Net):
    """The same loss, without the gradients of a layer."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.first(x))
        kept = hidden.detach() if torch.compiler.is_compiling() else hidden
        return {"loss": nn.functional.cross_entropy(self.last(kept + 0.5 * hidden), labels)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_backward_is_refused(dtype: torch.dtype):
    with pytest.raises(CaptureError, match=r"the gradient of first\.(weight|bias) is off by"):
        checked(OtherBackward(honest=True).to(dtype), dtype)


def test_neither_half_precision_nor_models_without_memory_are_compared():
    with torch.device("meta"):
        absent = Net(honest=False)
    for model, dtype in ((absent, None), (Net(honest=False), torch.bfloat16)):
        batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, -100, 2])}
        assert not check_numbers(capture(model, batch, dtype=dtype), model, batch, dtype)
