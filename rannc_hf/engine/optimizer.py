"""Optimizers made by the user over the original parameters, kept valid through the partition."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn


class OptimizerMap:
    """Edits param_groups of registered optimizers in place, because schedulers hold the optimizer and its groups.

    The user's Parameter objects survive the partition (they become views of flat masters), so groups only lose the
    parameters that other ranks hold.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: int = 1) -> None:
        """`ranks`: over how many ranks the parameters will be spread."""
        self._ranks = ranks
        self._names = {id(p): name for name, p in parameters.items()}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._order: list[list[list[str]]] = []
        self._owned: Collection[str] | None = None

    def knows_any(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether any of `parameters` is one of the model's."""
        return any(id(p) in self._names for p in parameters)

    @property
    def registered(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers, in the order they were registered."""
        return tuple(self._optimizers)

    def names(self, parameters: Iterable[torch.Tensor]) -> list[str]:
        """Names of `parameters`; those of the model alone have one."""
        return [self._names[id(p)] for p in parameters if id(p) in self._names]

    def order(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        """Names of the parameters in each group of a registered optimizer, as the user made it."""
        return self._order[self._optimizers.index(optimizer)]

    def register(self, optimizer: torch.optim.Optimizer) -> None:
        """Edit `optimizer` at the partition, or now if that has been.

        Raises:
            ValueError: for LBFGS on several ranks. Its directions and step sizes come from all parameters at once.
        """
        if isinstance(optimizer, torch.optim.LBFGS) and self._ranks > 1:
            raise ValueError(
                "LBFGS takes its directions from all parameters at once, of which a process may hold a part: use an "
                "optimizer that treats each parameter by itself (AdamW, SGD, Adafactor, ...), or one process"
            )
        if optimizer in self._optimizers:
            return
        self._optimizers.append(optimizer)
        self._order.append([self.names(group["params"]) for group in optimizer.param_groups])
        if self._owned is not None:
            self._edit(optimizer, self._owned)

    def partition(self, owned: Collection[str]) -> None:
        """Drop parameters outside of `owned` from all registered optimizers."""
        self._owned = owned
        for optimizer in self._optimizers:
            self._edit(optimizer, owned)

    def _edit(self, optimizer: torch.optim.Optimizer, owned: Collection[str]) -> None:
        for group in optimizer.param_groups:
            kept = []
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or name in owned:
                    kept.append(parameter)
                    _follow(optimizer, parameter)
                else:
                    optimizer.state.pop(parameter, None)
            group["params"] = kept


def _follow(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Bring states that were made with the optimizer (Adagrad's sums) to where the parameter has gone."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            state[key] = value.to(parameter.device)
