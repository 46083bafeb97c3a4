"""A block with its backward: outputs and what to keep from a forward, gradients from a backward.

Whoever runs blocks one after another keeps what each forward gives and hands gradients from one to the next. Autograd
does not see more than one block, and compiled blocks do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

BlockFunction = Callable[..., tuple[torch.Tensor, ...]]
Gradients = list[torch.Tensor | None]


class Differentiable(Protocol):
    """A pure function of `arguments` (parameters first, then values) with its derivative."""

    def forward(self, arguments: Sequence[torch.Tensor], keep: bool) -> tuple[tuple[torch.Tensor, ...], Any]:
        """The outputs, detached, and what `backward` needs where `keep`: it may be used once."""

    def backward(
        self, kept: Any, gradients: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]
    ) -> Gradients:
        """Go back through the forward that gave `kept`.

        Args:
            gradients: of each output; None where nothing depends on it.
            sums: for each parameter where its gradient is added, in its own precision; None where none is wanted.

        Returns:
            The gradient of each argument after the parameters; None where there is none.
        """


class WithAutograd:
    """A function that runs as it is.

    Args:
        function: takes the arguments one by one.
        wanted: for each argument whether it needs a gradient.
    """

    def __init__(self, function: BlockFunction, wanted: Sequence[bool]) -> None:
        self._function, self._wanted = function, tuple(wanted)

    def forward(self, arguments: Sequence[torch.Tensor], keep: bool) -> tuple[tuple[torch.Tensor, ...], Any]:
        if not keep:
            with torch.no_grad():
                return self._function(*arguments), None
        leaves = [a.detach().requires_grad_(wanted) for a, wanted in zip(arguments, self._wanted, strict=True)]
        with torch.enable_grad():
            outputs = self._function(*leaves)
        return tuple(output.detach() for output in outputs), (leaves, outputs)

    def backward(
        self, kept: Any, gradients: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]
    ) -> Gradients:
        leaves, outputs = kept
        heads = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not heads or not wanted:
            return [None] * (len(leaves) - len(sums))
        roots, seeds = zip(*heads)
        found = iter(torch.autograd.grad(roots, wanted, seeds, allow_unused=True))
        every = [next(found) if leaf.requires_grad else None for leaf in leaves]
        for total, gradient in zip(sums, every):
            if total is not None and gradient is not None:
                total.add_(gradient)
        return every[len(sums) :]
