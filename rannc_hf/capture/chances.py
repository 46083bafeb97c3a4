"""Random branches that are never, or always, taken: `torch.rand([]) < layerdrop` where layerdrop is 0."""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy
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
        if func is torch.Tensor.register_hook:
            # No refusal of ours: the module around it can run as it is written.
            raise RuntimeError("a hook on a tensor runs in the backward, of which a graph knows nothing")
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


# -- Python's and NumPy's generators ---------------------------------------------------------------------------------

DRAWS_ELSEWHERE = (
    "it draws random numbers from Python or NumPy, which no seed of a step repeats; turn that off in the model's "
    "config (mask_time_prob=0, ...)"
)


def generators_elsewhere() -> tuple[object, str]:
    """The states of Python's and NumPy's generators, to be compared."""
    return random.getstate(), str(numpy.random.get_state(legacy=False))


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards Python's and NumPy's generators are as they were."""
    own, other = random.getstate(), numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        random.setstate(own)
        numpy.random.set_state(other)


@contextlib.contextmanager
def extreme_draws(largest: bool) -> Iterator[Callable[[], bool]]:
    """Inside, uniform draws from Python and NumPy give the smallest number, or the `largest`.

    Of two exports, one with each, where a draw decides the graphs differ, and it is refused; where it does not, as
    with a layerdrop of 0, nothing is drawn. Yields a function that says whether anything else was drawn. Afterwards
    the generators are as they were.
    """
    drawn = _LARGEST if largest else _SMALLEST
    before = generators_elsewhere()

    def uniform(low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return low + (high - low) * (drawn if size is None else numpy.full(size, drawn))

    numpys: dict[str, Any] = {"uniform": uniform, "rand": lambda *size: uniform(size=size or None)}
    numpys |= dict.fromkeys(("random", "random_sample"), lambda size=None: uniform(size=size))
    pythons: dict[str, Any] = {"uniform": uniform, "random": lambda: drawn}
    with generators_kept(), mock.patch.multiple(numpy.random, **numpys), mock.patch.multiple(random, **pythons):
        yield lambda: generators_elsewhere() != before
