"""What a contender hands to whoever measures it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from contenders.presets import Contender
from contenders.work import Model


@dataclass(frozen=True)
class Place:
    """Where a rank trains, and what."""

    model: Model
    contender: Contender
    unique: int
    """Different samples in a batch."""
    dropout: float
    bf16: bool
    """Compute in bf16 with masters in fp32, or all in fp32."""
    rank: int
    devices: int
    device: torch.device
    limit_s: float
    """Seconds that the contender may take in all."""

    @property
    def samples(self) -> int:
        """Samples of a step on all devices."""
        return self.contender.samples(self.devices)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()


@dataclass(frozen=True)
class Training:
    """A model ready to train."""

    step: Callable[[], torch.Tensor | None]
    """Trains one step, optimizer included; gives the loss of this rank's samples, None on a rank that knows none."""
    facts: Callable[[], dict[str, Any]] = field(default=dict)
    """What else there is to say after the steps."""


def prepare_layers(layers: nn.ModuleList, contender: Contender) -> None:
    """Compile each layer, and have it computed again in the backward, as the contender says."""
    for index, layer in enumerate(layers):
        if contender.compiled:
            # The function, not the module: hooks, which shard and unshard, stay outside.
            layer.forward = torch.compile(layer.forward)
        if contender.recompute:
            layers[index] = checkpoint_wrapper(layer)
