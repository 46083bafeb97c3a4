"""Find the parts of a model that cannot be captured: the module that fails, then those around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import CaptureError, NotSplittable
from .prepare import Chosen, Regions, Selection, prepare

T = TypeVar("T")

_ATTEMPTS = 16
"""How many choices of modules are tried."""
_LARGE = 0.4
"""Share of a model's parameters above which a module runs in parts, if it can."""
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
    search = _Search(model, _found.get(model, {}))
    first: CaptureError | None = None
    for _ in range(_ATTEMPTS):
        try:
            result = capture(prepare(model, batch, total, dtype, search.selection))
        except CaptureError as error:
            first = first or error
            if not search.widen(error):
                raise _told(first, error) from error
        else:
            _found[model] = search.selection
            return result
    assert first is not None
    raise first


def _told(first: CaptureError, last: CaptureError) -> CaptureError:
    if last is first or str(last) in str(first):
        return first
    if isinstance(last, NotSplittable):
        # That decides: nothing that could be done about the first would help.
        return CaptureError(f"{last}\nIt was to run as it is because {first}")
    return CaptureError(f"{first}\nRunning the module as it is does not help: {last}")


class _Search:
    """The choices of modules for a model."""

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        self.model = model
        self.selection = dict(selection)
        self.refused: set[str] = set()
        """Modules that cannot run as one region."""
        self.uncut: set[str] = set()
        """Modules whose code cannot run in parts."""

    def widen(self, error: CaptureError) -> bool:
        """Go on to the next choice after `error`; False where there is none."""
        path = error.module
        if path is None:
            return False
        around = next((p for p, c in self.selection.items() if not c.in_parts and _holds(p, path)), None)
        if around is not None:
            self.refused.add(around)
            return self.choose(_callable(self.model, around.rpartition(".")[0]) if around else "", error, around)
        if path in self.selection:
            self.uncut.add(path)
            return self.choose(path, error, path)
        return self.choose(_callable(self.model, path), error, None)

    def choose(self, path: str, error: CaptureError, instead: str | None) -> bool:
        """Let the module `path` run as it is: as one region, or in parts where it is most of the model."""
        reason = self.selection[instead].reason if instead is not None else _reason(error)
        failed_inside = instead is not None and instead != path
        if not failed_inside and path not in self.uncut and self.is_large(path):
            self.put(path, Chosen(reason, in_parts=True))
            return True
        if not path or path in self.refused:
            return False
        self.put(path, Chosen(reason))
        return True

    def put(self, path: str, chosen: Chosen) -> None:
        for other in _alike(self.model, path) if path else [""]:
            if not chosen.in_parts:
                self.selection = {p: c for p, c in self.selection.items() if not _holds(other, p)}
            self.selection[other] = chosen

    def is_large(self, path: str) -> bool:
        """Whether little would be left to other stages: then it is worth while to capture its submodules."""
        sizes = {id(p): p.numel() for p in self.model.get_submodule(path).parameters()}
        return not path or sum(sizes.values()) > _LARGE * sum(p.numel() for p in self.model.parameters())


def _holds(path: str, other: str) -> bool:
    return not path or other == path or other.startswith(f"{path}.")


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
