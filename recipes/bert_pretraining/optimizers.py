"""The optimizer of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from lamb import Lamb
from settings import TrainingSettings


def build_optimizer(
    model: torch.nn.Module, settings: TrainingSettings, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """AdamW or LAMB. Vectors, which are biases and the scales of layer norms, have no weight decay.

    device: that the model will be trained on, where it is not there yet.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, settings.adam_beta2)}
    options["eps"] = settings.epsilon
    if settings.optimizer == "lamb":
        # A layer norm starts at a norm that means nothing, a bias at 0: they take Adam's steps.
        groups[1]["adapt"] = False
        return Lamb(groups, **options)
    optimizer = torch.optim.AdamW(groups, **options)
    if device is not None and device.type == "cuda":
        # One kernel for all parameters. As an argument it would ask for parameters that are on the device already.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer
