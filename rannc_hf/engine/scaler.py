"""`LossScaler`: PyTorch's loss scaler for fp16, for an optimizer whose parameters are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from rannc_hf.engine.transport import Transport


class LossScaler(GradScaler):
    """A GradScaler that skips a step, and lowers its scale, on all ranks where gradients overflowed on any of them.

    Under DistributedDataParallel every rank has all gradients and finds the same; here each has those of its own
    parameters, perhaps none. `unscale_` and `step` are collective once `transport` is set.
    """

    transport: Transport | None = None
    """Connects the ranks that train together; None for this process alone."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        # What `unscale_` and fused optimizers' steps both go through; FSDP's scaler of PyTorch overrides it too.
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        anywhere = found_inf.clone()
        for value in found.values():
            anywhere = torch.maximum(anywhere, value.to(anywhere.device))
        if self.transport is not None:
            what = "whether gradients overflowed"
            self.transport.all_reduce(anywhere, self.transport.everyone, what, "max").wait()
        # Also where this rank has no gradients: it must step, or not, like the others.
        return {anywhere.device: anywhere}

    def current(self, device: torch.device) -> torch.Tensor:
        """The scale as a scalar on `device`, without waiting for it."""
        scaled: Any = self.scale(torch.ones((), device=device))
        return scaled
