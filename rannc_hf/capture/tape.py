"""What the tensors of a forward hold that runs without data: their values, and the calls on data that give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from .calls import map_tensors, plainly, writes_to_first
from .guards import Call, Slot


@dataclass
class _Shadow:
    """What a tensor holds: its value, how it is computed (a slot of the tape), and the fields it depends on."""

    value: torch.Tensor
    slot: int
    fields: frozenset[str]


class Tape:
    """Calls on data in the order they were done, and which tensors of the forward their results are the values of."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.inputs: dict[int, str] = {}
        """Fields of the batch by slot."""
        self._slots = 0
        self._shadows: Any = WeakTensorKeyDictionary()
        self._spoilt: set[int] = set()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Whether the value of a tensor is known."""
        return self._get(tensor) is not None

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a tensor holds, if it is known."""
        shadow = self._get(tensor)
        return shadow.value if shadow is not None else None

    def fields(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        """The fields that tensors depend on, whose values are known."""
        return frozenset[str]().union(*(self._shadows[x].fields for x in tensors))

    def hold_field(self, name: str, data: torch.Tensor, tensor: torch.Tensor) -> None:
        """Let `tensor`, an argument of the forward, have the value of a field of the batch."""
        self.inputs[self._slots] = name
        with plainly():
            own = data.clone()
            if own.shape != tensor.shape:
                # Folded: what forward is given is flat.
                flat = Call(torch.flatten, (Slot(self._slots), 0, 1), {}).giving((self._slots + 1,))
                self.calls.append(flat)
                self._slots += 1
                own = own.flatten(0, 1)
        self._set(tensor, own, frozenset({name}))

    def do(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call on the values of its arguments, all known. It is kept, to be done for other batches."""
        with plainly():
            data = map_tensors(lambda t: self._shadows[t].value, (args, kwargs))
            real = func(*data[0], **data[1])
        writes = writes_to_first(getattr(func, "__name__", ""), kwargs)
        slots = map_tensors(lambda t: Slot(self._shadows[t].slot), (args, kwargs))
        self.calls.append(Call(func, slots[0], slots[1], writes))
        return real

    def hold(self, result: Any, real: Any, fields: frozenset[str]) -> None:
        """Let the tensors of `result` have the values that the last call gave."""
        found, values = pytree.tree_leaves(result), pytree.tree_leaves(real)
        slots: list[int | None] = []
        for tensor, value in zip(found, values):
            alike = isinstance(tensor, torch.Tensor) and isinstance(value, torch.Tensor)
            alike = alike and tensor.shape == value.shape and tensor.dtype == value.dtype
            if not alike:
                slots.append(None)
                continue
            old = self._get(tensor) if self.calls[-1].writes else None
            slots.append(old.slot if old is not None else self._set(tensor, value, fields))
        self.calls[-1] = self.calls[-1].giving(tuple(slots))

    def expect(self, value: Any) -> None:
        """The model read what the last call gave: `value`."""
        self.calls[-1] = self.calls[-1].expecting(value)

    def forget(self, tensor: torch.Tensor) -> None:
        """Something unknown was written to a tensor: it and all that share its memory are known no more."""
        shadow = self._get(tensor)
        if shadow is not None:
            self._spoilt.add(shadow.value.untyped_storage()._cdata)

    def _get(self, tensor: torch.Tensor) -> _Shadow | None:
        shadow: _Shadow | None = self._shadows.get(tensor)
        if shadow is None or shadow.value.untyped_storage()._cdata in self._spoilt:
            return None
        return shadow

    def _set(self, tensor: torch.Tensor, value: torch.Tensor, fields: frozenset[str]) -> int:
        self._shadows[tensor] = _Shadow(value, self._slots, fields)
        self._slots += 1
        return self._slots - 1
