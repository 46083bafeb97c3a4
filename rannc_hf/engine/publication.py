"""The loss that a script gets: its backward publishes gradients that the pipeline has computed already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rannc_hf.engine.model import RanncModel


class Publish(torch.autograd.Function):
    """Returns the loss; its backward publishes gradients that the pipeline has computed already."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, loss: torch.Tensor, model: RanncModel, step: int) -> torch.Tensor:
        ctx.model, ctx.step = model, step
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.model.publish(gradients[0], ctx.step)
        return None, None, None, None
