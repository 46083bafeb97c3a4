"""LAMB: Adam whose step is as long for each parameter as that parameter is.

After Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, algorithm 2,
with the norm itself as the scaling function. It reads the norm of each parameter, so it needs whole ones, as one
process, DistributedDataParallel and rannc_hf have them (which divides parameters among devices, but never one of them);
not FSDP's shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """LAMB with decoupled weight decay and without clipping, which is the caller's.

    Args:
        params: parameters or groups. A group may set `adapt` to False: its steps are Adam's, as is common for biases
            and layer norms.
        lr: the step is this share of the parameter's norm.
        betas: of the running means of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: this times the parameter is added to the update before its norm is taken.

    Raises ValueError for values outside their range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr}, eps={eps} and weight_decay={weight_decay} must be at least 0, betas in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient. Nothing waits for a device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        assert gradient is not None
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**step)).div_(root)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        if group["adapt"]:
            length, own = parameter.norm(), update.norm()
            # Where either is 0 there is no ratio: a parameter that starts at 0 could never leave it.
            update.mul_(torch.where((length > 0) & (own > 0), length / own, torch.ones_like(length)))
        parameter.sub_(update, alpha=group["lr"])
