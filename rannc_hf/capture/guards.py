"""What a batch must agree with for a captured step to hold for it, checked on the batch's data alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

_NOTHING = object()


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in the arguments of a `Call`."""

    index: int


@dataclass(frozen=True)
class Call:
    """A call that gives tensors, or a value that the model read."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    writes: bool = False
    """Whether it changes its first argument."""
    slots: tuple[int | None, ...] = ()
    """Where its results go, leaf by leaf."""
    expected: Any = _NOTHING
    """What it must give."""

    def giving(self, slots: tuple[int | None, ...]) -> Call:
        return replace(self, slots=slots)

    def expecting(self, value: Any) -> Call:
        return replace(self, expected=value)

    @property
    def read(self) -> bool:
        return self.expected is not _NOTHING

    def needs(self) -> list[int]:
        return [x.index for x in pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_slot) if _is_slot(x)]


@dataclass(frozen=True)
class Read:
    """One number (or list, or tensor) that a model read."""

    function: str
    value: Any
    fields: frozenset[str]
    shape: tuple[int, ...]
    """Of the tensor read."""
    line: str | None
    """Where, in the model's code."""


@dataclass(frozen=True)
class Guards:
    """Computes again what the model read while it was captured, for another batch of the same shapes."""

    fields: Mapping[int, str]
    """Field of the batch by slot."""
    calls: Sequence[Call]
    uniform: frozenset[str]
    """Fields in which all samples must be alike."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the fields, with the number of samples, which the calls were made for."""

    @property
    def values(self) -> tuple[Any, ...]:
        """What the model read."""
        return tuple(call.expected for call in self.calls if call.read)

    @staticmethod
    def of(
        fields: Mapping[int, str],
        calls: Sequence[Call],
        uniform: frozenset[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Guards:
        """Guards from all calls on data: those that decide nothing are left out."""
        needed: set[int] = set()
        kept: list[Call] = []
        writes = any(call.writes for call in calls)
        for call in reversed(calls):
            # What is written to may be seen through other tensors: then all calls up to the write are kept.
            if call.read or call.writes or writes or needed.intersection(s for s in call.slots if s is not None):
                kept.append(call)
                needed.update(call.needs())
        kept.reverse()
        last = max((i for i, call in enumerate(kept) if call.read), default=-1)
        used = {slot: name for slot, name in fields.items() if slot in needed}
        return Guards(used, tuple(kept[: last + 1]), uniform, {name: shapes[name] for name in used.values()})

    def hold(self, batch: Mapping[str, Any]) -> bool:
        """Whether the step holds for `batch`."""
        if any(tuple(batch[name].shape) != shape for name, shape in self.shapes.items()):
            return False
        for name in self.uniform:
            if bool((batch[name] != batch[name][:1]).any()):
                return False
        slots = {slot: batch[name].detach().cpu().clone() for slot, name in self.fields.items()}
        try:
            with torch.no_grad():
                return all(self._done(call, slots) for call in self.calls)
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError):
            # Shapes that other values decided: a value read on the way was another one.
            return False

    def _done(self, call: Call, slots: dict[int, torch.Tensor]) -> bool:
        """Do a call; whether it gives what is expected of it."""
        args, kwargs = pytree.tree_map_only(Slot, lambda s: slots[s.index], (call.args, call.kwargs), is_leaf=_is_slot)
        result = call.function(*args, **kwargs)
        for slot, value in zip(call.slots, pytree.tree_leaves(result)):
            if slot is not None:
                slots[slot] = value
        return not call.read or _equal(result, call.expected)


def _is_slot(value: Any) -> bool:
    return isinstance(value, Slot)


def _equal(a: Any, b: Any) -> bool:
    first, second = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(first) == len(second) and all(_same(x, y) for x, y in zip(first, second))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b) or (a != a and b != b)
