"""Rows that a known mask picks, where samples have different numbers of them: sounds of different lengths in a text.

A model picks what is valid of its features, works on each row for itself, and puts the rows where the text has places
for them. Of a slice of the batch the number of rows is not known. So each sample keeps all of its rows: first those
picked, then others, as zeros. This is exact while every row is worked on by itself, and while, in the end, each
sample has as many places as rows of its own. The first is watched here, function by function; the second is read from
the batch. Whatever else is done with such rows is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .calls import leaves_of, plainly
from .checks import only_told
from .errors import CaptureError

_SHAPE: Any = torch.Tensor.shape
_SIZES = (_SHAPE.__get__, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.__len__)
_DESCRIBES = ("__get__", "dim", "ndimension", "is_floating_point", "is_complex", "get_device", "__hash__")
_ALONE = ("to", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach", "gelu", "relu", "silu", "tanh",
          "sigmoid", "dropout")  # fmt: skip
_WITH_WEIGHTS = ("linear", "layer_norm", "add", "__add__", "__radd__", "sub", "__sub__", "mul", "__mul__", "__rmul__")
"""Functions that work on each row. Those listed have finite gradients for rows of zeros."""
_PLACES = ("masked_scatter", "masked_scatter_", "__setitem__")


class Asked(Protocol):
    """What answers what is read out of the batch (`values.Known`)."""

    def ask(self, func: Callable[..., Any], args: Any) -> Any: ...
    def value(self, tensor: torch.Tensor) -> torch.Tensor | None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


class Count:
    """How many entries there are in rows picked: a number of the batch, read only where the number itself is used."""

    def __init__(self, known: Asked, mask: torch.Tensor, factor: int) -> None:
        self.known, self.mask, self.factor = known, mask, factor

    def __index__(self) -> int:
        return int(self.known.ask(count_entries, (self.mask, self.factor)))

    __int__ = __index__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Count):
            return bool(self.known.ask(same_entries, (self.mask, self.factor, other.mask, other.factor)))
        return int(self) == other

    def __hash__(self) -> int:
        return hash(int(self))

    def __str__(self) -> str:
        value = self.known.value(self.mask)
        if value is None or not only_told(sys._getframe(1)):
            return str(int(self))
        with plainly():
            return str(count_entries(value, self.factor))


def _as_number(name: str) -> Callable[..., Any]:
    def method(self: Count, *others: Any) -> Any:
        return getattr(int(self), name)(*(int(o) if isinstance(o, Count) else o for o in others))

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod",
              "rmod", "lt", "le", "gt", "ge", "bool", "float", "neg"):  # fmt: skip
    setattr(Count, f"__{_name}__", _as_number(f"__{_name}__"))


class Rows:
    """Picks rows, and follows them through a forward."""

    def __init__(self, known: Asked, samples: int) -> None:
        self._known, self._samples = known, samples
        self._masks: Any = WeakTensorKeyDictionary()
        self.any = False
        """Whether any have been picked."""

    def pick(self, table: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``table[mask]``, padded to the same number of rows in each sample."""
        made = pick_padded(table, mask, self._samples)
        self._masks[made] = mask
        self.any = True
        return made

    def holds(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and self._masks.get(value) is not None

    def call(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """A call of any function: whether it was one on such rows, and its result."""
        rows = next((x for x in leaves_of((args, kwargs)) if self.holds(_outside_of_vmap(x))), None)
        if rows is None:
            return False, None
        if not self.holds(rows):
            raise self.refuse(f"'{name}' was called on each of them")
        return True, self._on_rows(func, name, rows, args, kwargs)

    def _on_rows(self, func: Any, name: str, rows: torch.Tensor, args: Any, kwargs: Any) -> Any:
        if func in _SIZES:
            return self._size(func, rows, *args[1:], **kwargs)
        if name in _PLACES:
            given = dict(zip(("table", "mask", "source"), args)) | kwargs
            if self.holds(given["source"]) and not self.holds(given["table"]):
                return self._place(name, **given)
        elif name in _DESCRIBES:
            result = func(*args, **kwargs)
            if not isinstance(result, torch.Tensor):
                return result
        elif self._apart(name, rows, args, kwargs):
            result = func(*args, **kwargs)
            self._masks[result] = self._masks[rows]
            return result
        raise self.refuse(f"'{name}' was called on them")

    def _apart(self, name: str, rows: torch.Tensor, args: Any, kwargs: Any) -> bool:
        """Whether a function works on each row for itself."""
        tensors = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor)]
        if kwargs.get("inplace") or len(kwargs.keys() & {"out"}):
            return False
        if name in _ALONE:
            return len(tensors) == 1
        if name not in _WITH_WEIGHTS or args[:1] == () or rows.dim() < 2:
            return False
        if name in ("linear", "layer_norm"):
            normalized = name == "linear" or len(kwargs.get("normalized_shape", args[1:2] and args[1])) < rows.dim()
            return args[0] is rows and normalized and not any(self.holds(x) for x in tensors[1:])
        # Broadcast from the right, what has fewer dimensions does not meet that of the rows.
        return all(
            self._masks[x] is self._masks[rows] and x.shape == rows.shape if self.holds(x) else x.dim() < rows.dim()
            for x in tensors
        )

    def _size(self, func: Any, rows: torch.Tensor, dim: int | None = None) -> Any:
        rest, mask = rows.shape[1:], self._masks[rows]
        if func in (torch.Tensor.numel, torch.Tensor.nelement):
            return Count(self._known, mask, math.prod(rest))
        count = Count(self._known, mask, 1)
        if func == torch.Tensor.__len__:
            return int(count)
        shape = (count, *rest)
        return shape if dim is None else shape[dim]

    def _place(self, name: str, table: torch.Tensor, mask: Any, source: torch.Tensor) -> Any:
        own = self._masks[source]
        value = self._known.value(mask) if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool else None
        if value is None:
            raise self.refuse("they are put where a mask says that is not known from the batch")
        each = source.to(table.dtype).reshape(self._samples, -1)
        with self._known:
            whole = mask.reshape(*mask.shape, *[1] * (table.dim() - mask.dim())) if name == "__setitem__" else mask
            whole = whole.expand(table.shape)
            if not self._known.ask(same_shares, (whole, own, self._samples, math.prod(source.shape[1:]))):
                raise self.refuse("not each sample has as many places for them as it has rows")
            made = place_padded(table, whole, each)
            return made if name == "masked_scatter" else table.copy_(made)

    def refuse(self, what: str) -> CaptureError:
        return CaptureError(
            f"a mask picks different numbers of rows of the samples of a batch, and {what}: parts of the batch would "
            "be computed in another way"
        )


def _outside_of_vmap(value: Any) -> Any:
    """The tensor that stands for its rows inside of `vmap`."""
    while isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


# -- done with data, and in the graph ---------------------------------------------------------------------------------


def count_entries(mask: torch.Tensor, factor: int) -> int:
    return int(mask.sum()) * factor


def same_entries(a: torch.Tensor, first: int, b: torch.Tensor, second: int) -> bool:
    return count_entries(a, first) == count_entries(b, second)


def same_shares(places: torch.Tensor, mask: torch.Tensor, samples: int, width: int) -> bool:
    """Whether each sample has as many places as entries, of `width` a row."""
    wanted = mask.reshape(samples, -1).sum(1) * width
    return places.shape[0] % samples == 0 and torch.equal(places.reshape(samples, -1).sum(1), wanted)


def pick_padded(table: torch.Tensor, mask: torch.Tensor, samples: int) -> torch.Tensor:
    """Of each sample, the rows in `mask` in order, then as many rows of zeros as others were left out."""
    rest = table.shape[mask.dim() :]
    each = mask.reshape(samples, -1)
    picked, order = each.to(torch.int8).sort(dim=1, descending=True, stable=True)
    rows = table.reshape(samples, each.shape[1], -1)
    rows = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
    # Zeros, so that what was left out is finite.
    return rows.masked_fill(picked[..., None] == 0, 0).reshape(samples * each.shape[1], *rest)


def place_padded(table: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``table.masked_scatter(mask, source)``, where each sample takes from its own row of `source` in order."""
    order = mask.reshape(len(source), -1).to(torch.int64).cumsum(1) - 1
    values = source.gather(1, order.clamp(min=0))
    return torch.where(mask, values.reshape(table.shape), table)
