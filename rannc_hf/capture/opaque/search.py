"""Find the parts of a model that cannot be captured: the module that fails, then those around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import CaptureError
from .prepare import Chosen, Regions, Selection, prepare

T = TypeVar("T")

_ATTEMPTS = 16
"""How many choices of modules are tried."""
_found: WeakKeyDictionary[nn.Module, Selection] = WeakKeyDictionary()
"""What was found for a model, for its captures with other shapes."""


def with_regions(
    model: nn.Module,
    batch: Mapping[str, Any],
    total: int,
    dtype: torch.dtype | None,
    capture: Callable[[Regions], T],
) -> T:
    """`capture`, given as few modules that run as they are as it takes.

    Where it fails in a module, that one runs as it is, and all like it; where this is not possible, or does not help,
    the module around it.

    Raises:
        CaptureError: of the first failure, where no choice of modules helps, with what was tried last.
    """
    selection: Selection = _found.get(model, {})
    first: CaptureError | None = None
    for _ in range(_ATTEMPTS):
        try:
            result = capture(prepare(model, batch, total, dtype, selection))
        except CaptureError as error:
            first = first or error
            wider = widened(model, selection, error)
            if wider is None:
                raise _told(first, error) from error
            selection = wider
        else:
            _found[model] = selection
            return result
    assert first is not None
    raise first


def _told(first: CaptureError, last: CaptureError) -> CaptureError:
    if last is first or str(last) in str(first):
        return first
    return CaptureError(f"{first}\nRunning the module as it is does not help: {last}")


def widened(model: nn.Module, selection: Selection, error: CaptureError) -> Selection | None:
    """The next choice after `error`; None where there is none."""
    path = error.module
    if path is None:
        return None
    inside = next((p for p in selection if path == p or path.startswith(f"{p}.")), None)
    target = _around(model, inside) if inside is not None else _callable(model, path)
    if not target:
        return None
    reason = selection[inside].reason if inside is not None else _reason(error)
    kept = {p: chosen for p, chosen in selection.items() if not f"{p}.".startswith(f"{target}.")}
    for other in _alike(model, target):
        kept = {p: c for p, c in kept.items() if not p.startswith(f"{other}.")}
        kept[other] = Chosen(reason)
    return kept


def _around(model: nn.Module, path: str) -> str:
    return _callable(model, path.rpartition(".")[0])


def _callable(model: nn.Module, path: str) -> str:
    """The path of a module that is called, which lists of modules are not: the one around them is."""
    while path and isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def _alike(model: nn.Module, path: str) -> list[str]:
    """Modules of the same class at the same place of repeated modules, such as of all layers."""
    kind, place = type(model.get_submodule(path)), pattern(path)
    return [n for n, m in model.named_modules() if type(m) is kind and pattern(n) == place]


def pattern(path: str) -> str:
    """The place of a module among repeated ones."""
    return re.sub(r"\d+", "*", path)


def _reason(error: CaptureError) -> str:
    """The line of the user's code, and what it ran into."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines[1:3] if line]
    return "; ".join(told) if told else lines[0]
