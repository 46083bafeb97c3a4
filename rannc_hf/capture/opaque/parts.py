"""A forward in parts: what a module does between its calls of submodules, which are captured by themselves.

Where the code of a large module cannot be captured (the features of an image put among those of a text, a loss that
matches what was detected), its submodules still can. Recorded here is what each of them is given, and which of these
tensors are just handed on: no code has to run for those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..ambient import told_exporting
from ..watch import register_outputs
from .template import copies, tensors_in
from .tuples import Path, without


@dataclass
class Event:
    """A call of a submodule, or the end of the forward."""

    path: str | None
    """None at the end."""
    arguments: Any
    """(args, kwargs), or what the forward returns."""
    sources: list[int]
    """For each of its tensors the number of a tensor that is known by then, or that of a new one."""
    first_new: int
    """The number of the first new one."""
    draws: bool
    """Whether random numbers were drawn since the call before."""
    result: Any = None

    @property
    def takes(self) -> tuple[int, ...]:
        """Which of the tensors are new, each once."""
        found: dict[int, int] = {}
        for position, source in enumerate(self.sources):
            if source >= self.first_new:
                found.setdefault(source, position)
        return tuple(found.values())


@dataclass
class Parts:
    """What happens in a forward, in order. Tensors have numbers: inputs, then new arguments and results of calls."""

    inputs: int
    events: list[Event] = field(default_factory=list)
    results: list[range] = field(default_factory=list)
    """For each call the numbers of its results."""
    written: set[int] = field(default_factory=set)
    """Inputs and results that the forward writes to."""

    @property
    def called(self) -> tuple[str, ...]:
        """The submodules that are called."""
        return tuple(dict.fromkeys(event.path for event in self.events if event.path is not None))

    def returning_without(self, paths: Collection[Path], whose: str) -> Parts:
        """The same, but for the parts at `paths` of what the forward returns."""
        *calls, end = self.events
        arguments = without(end.arguments, paths, f"'{whose}'")
        kept = {id(tensor) for tensor in tensors_in(arguments)}
        sources: list[int] = []
        new: dict[int, int] = {}
        for tensor, source in zip(tensors_in(end.arguments), end.sources, strict=True):
            if id(tensor) in kept:
                known = source < end.first_new
                sources.append(source if known else new.setdefault(source, end.first_new + len(new)))
        return replace(self, events=[*calls, replace(end, arguments=arguments, sources=sources)])


class Recorder:
    """Records the calls that the forward of `module` itself makes. The caller restores the modules."""

    def __init__(self, module: nn.Module, generator: Callable[[], bytes]) -> None:
        self._generator, self._state = generator, b""
        self._parts: Parts | None = None
        self._inside = self._exporting = False
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        for path, child in module.named_modules():
            if path:
                child.__dict__["forward"] = self._recorded(path, child.forward)

    def begin(self, inputs: Any) -> None:
        """The forward is called. What its submodules are told of being exported is what it would be told itself."""
        self._exporting = torch.compiler.is_exporting()
        self._tensors, self._versions = [], []
        given = self._number(tensors_in(inputs))
        self._parts, self._inside, self._state = Parts(len(given)), False, self._generator()

    def end(self, outputs: Any) -> Parts:
        """The forward has returned."""
        assert self._parts is not None
        self._event(None, outputs)
        parts, self._parts = self._parts, None
        return parts

    def _recorded(self, path: str, forward: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._parts is None or self._inside:
                return forward(*args, **kwargs)
            register_outputs((args, kwargs))
            event = self._event(path, (args, kwargs))
            self._inside = True
            with told_exporting(self._exporting):
                result = forward(*args, **kwargs)
            self._inside = False
            register_outputs(result)
            event.result = copies(result)
            numbers = self._number(tensors_in(result))
            self._parts.results.append(numbers)
            self._state = self._generator()
            return result

        return recorded

    def _event(self, path: str | None, arguments: Any) -> Event:
        assert self._parts is not None
        first = len(self._tensors)
        numbers: dict[int, int] = {}
        for i, (tensor, version) in enumerate(zip(self._tensors, self._versions)):
            if tensor._version != version:
                self._parts.written.add(i)
            else:
                # The last one: a call may return what it was given as it is (dropout in evaluation).
                numbers[id(tensor)] = i
        sources = []
        for tensor in tensors_in(arguments):
            if id(tensor) not in numbers:
                numbers[id(tensor)] = self._number([tensor])[0]
            sources.append(numbers[id(tensor)])
        event = Event(path, copies(arguments), sources, first, self._generator() != self._state)
        self._parts.events.append(event)
        return event

    def _number(self, tensors: Sequence[torch.Tensor]) -> range:
        start = len(self._tensors)
        self._tensors += tensors
        self._versions += [t._version for t in tensors]
        return range(start, len(self._tensors))
