"""Recomputation of a block: its forward keeps the inputs only, its backward runs it again.

The block is one node of autograd. `torch.utils.checkpoint` does the same for any code, by hooks on every saved tensor;
for launch-bound blocks those cost more than the block itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def recomputed(
    function: Callable[..., tuple[torch.Tensor, ...]], arguments: Sequence[torch.Tensor], differentiable: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """``function(*arguments)``, computed again in the backward. `function` must draw the same random numbers each time.

    Args:
        differentiable: for each result whether a gradient flows into it.
    """
    result: tuple[torch.Tensor, ...] = _Recompute.apply(function, differentiable, *arguments)
    return result


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, differentiable: Sequence[bool], *arguments: torch.Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*arguments)
        # As in the backward: a compiled function is one program with and another without gradients, and the two need
        # not draw the same random numbers.
        with torch.enable_grad():
            found = function(*(a.detach().requires_grad_(a.requires_grad) for a in arguments))
        results = tuple(r.detach() for r in found)
        ctx.mark_non_differentiable(*(r for r, flows in zip(results, differentiable) if not flows))
        # A result without a gradient is a loss that nothing uses, not zeros to go through the block for.
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        arguments = [a.detach().requires_grad_(a.requires_grad) for a in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.function(*arguments)
        heads = [(r, g) for r, g in zip(results, gradients) if g is not None and r.requires_grad]
        leaves = [a for a in arguments if a.requires_grad]
        if not heads or not leaves:
            return (None, None, *(None for _ in arguments))
        found = iter(torch.autograd.grad([r for r, _ in heads], leaves, [g for _, g in heads], allow_unused=True))
        return (None, None, *(next(found) if a.requires_grad else None for a in arguments))
