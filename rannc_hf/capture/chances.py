"""Random branches that are never, or always, taken: `torch.rand([]) < layerdrop` where layerdrop is 0."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_DRAWS = (torch.rand, torch.rand_like)
_COMPARES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("lt", "__lt__"), operator.lt),
    **dict.fromkeys(("le", "__le__"), operator.le),
    **dict.fromkeys(("gt", "__gt__"), operator.gt),
    **dict.fromkeys(("ge", "__ge__"), operator.ge),
}
_SMALLEST, _LARGEST = 0.0, 1.0 - 2.0**-53
"""Between these is whatever `torch.rand` draws, in any dtype."""


class Chances(TorchFunctionMode):
    """Answers `if` on comparisons of uniform random numbers with a number that is outside of their range.

    Export cannot know the outcome of a draw, but here no draw decides. Nothing else is answered: where a draw does
    decide, the step is another one each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draws: Any = WeakTensorKeyDictionary()
        self._settled: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0] in self._settled:
            return self._settled[args[0]]
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func in _DRAWS:
            self._draws[result] = True
        elif compare := _COMPARES.get(name):
            self._settle(compare, args, result)
        elif (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            # Written to: no longer what was drawn, or compared. Functions of `torch.nn.init` come with names alone.
            written = args[0] if args else next(iter((kwargs or {}).values()), None)
            for known in (self._draws, self._settled) if isinstance(written, torch.Tensor) else ():
                known.pop(written, None)
        return result

    def _settle(self, compare: Callable[[Any, Any], Any], args: Any, result: Any) -> None:
        if len(args) != 2 or not isinstance(args[1], int | float) or not isinstance(args[0], torch.Tensor):
            return
        if args[0] in self._draws and isinstance(result, torch.Tensor):
            outcomes = {compare(drawn, args[1]) for drawn in (_SMALLEST, _LARGEST)}
            if len(outcomes) == 1:
                self._settled[result] = outcomes.pop()
