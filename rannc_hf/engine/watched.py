"""What a script may change in a model between steps, and what it may not once the parameters are placed.

A step runs graphs, which were captured from the model as it was. What has changed since is found before every forward:
the model is captured anew as it is now (`Watched.look`), or the change is refused (`Placed.check`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from rannc_hf.capture import Graph
from rannc_hf.capture.state import state_is_lent
from rannc_hf.engine.attached import Hook
from rannc_hf.engine.looks import MODE, Look, Names

_TOLD = 3
"""Changes that are told one by one."""


class Watched:
    """Finds what has changed in a module since its parameters were placed. Knows of one rank's module.

    What the module itself writes while it runs inside `RanncModel.whole()` (caches of positions, counters) does not
    count from then on: the engine's graphs do not write it, and it would change without end.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = Names()
        self._look: Look | None = None
        self._placed: Placed | None = None
        self._first: dict[str, str] = {}
        self._own: set[str] = set()
        self._hooks: set[int] = set()
        """Ids of hooks that do not count: the engine's, and those that the module itself has put in."""
        self._runs_alone = False
        self._state = ""

    def place(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The parameters have been placed: from now on changes are found.

        To be called when the first graph has been captured, which leaves behind what the first forward would.
        """
        self._placed = Placed(self._module, parameters)
        self._refresh()
        assert self._look is not None
        self._first = dict(self._look.values)
        if not self._module.training:
            # Parts in another mode than the model's took its mode for the training graph.
            self._first = {k: v for k, v in self._first.items() if k.rpartition(".")[2] != MODE}
        self._refresh()

    def look(self, lent: bool) -> str:
        """What has changed, in a few words, equal on ranks whose models were changed alike; "" for nothing.

        lent: whether the parameters are others for a while, as they are inside of `whole()`.

        Raises:
            ValueError: for what may not change, and for hooks that would never run.
        """
        if self._placed is None or self._look is None:
            refuse_hooks(self._module.named_parameters())
            return ""
        self._placed.check(self._module.training, lent)
        if not self._look.holds():
            self._refresh()
        return self._state

    def captured(self) -> None:
        """The model was captured again. What that has changed (in a config, say) is as if it had always been so."""
        if self._look is None or self._look.holds():
            return
        before = self._look.values
        self._refresh()
        for name in _differing(before, self._look.values):
            self._first.pop(name, None)
            if name in self._look.values:
                self._first[name] = self._look.values[name]
        self._refresh()

    @contextlib.contextmanager
    def running(self, around: AbstractContextManager[None]) -> Iterator[None]:
        """`around`, in which the module runs by itself: what it writes is its own."""
        with around, self._observed():
            yield

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        if self._look is None or self._runs_alone:
            yield
            return

        def enter(module: nn.Module, args: Any) -> None:
            if not state_is_lent() and self._look is not None and not self._look.holds():
                self._refresh()

        def leave(module: nn.Module, args: Any, outputs: Any) -> None:
            if not state_is_lent() and self._look is not None and not self._look.holds():
                before = self._look
                self._refresh()
                self._hooks |= self._look.hooks - before.hooks
                self._refresh()
                # From now on these are not looked at, which would take milliseconds for every token.
                self._own |= _differing(before.values, self._look.values)
                self._refresh()

        handles = [
            self._module.register_forward_pre_hook(Hook(enter), prepend=True),
            self._module.register_forward_hook(Hook(leave)),
        ]
        self._hooks |= {handle.id for handle in handles}
        self._runs_alone = True
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._runs_alone = False
            self._refresh()

    def _refresh(self) -> None:
        """Look again, and say what has changed since the first look."""
        self._look = look = Look(self._module, self._names, self._hooks, self._own)
        now, first = look.values, self._first
        changed = sorted(_differing(first, now) - self._own)
        self._state = _told([f"{n}: {now.get(n, _GONE)} (was {first.get(n, _GONE)})" for n in changed])


_GONE = "nothing"
_LIBRARIES = ("rannc_hf", "torch", "transformers", "accelerate")
_is_trained = attrgetter("requires_grad")
_hooks, _late_hooks = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def _differing(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name, _ in before.items() ^ after.items()}


def _told(lines: Sequence[str]) -> str:
    """The changes as one line, which also tells those apart that are too many to be spelled."""
    if len(lines) <= _TOLD and sum(map(len, lines)) < 500:
        return "; ".join(lines)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return f"{'; '.join(line[:150] for line in lines[:_TOLD])}; {len(lines)} changes in all, #{digest}"


class Placed:
    """What may not change once the parameters are placed: which parameters and modules there are, and their memory."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._values = list(self.parameters.values())
        self._trained = list(map(_is_trained, self._values))
        self._memory = list(map(torch.Tensor.data_ptr, self._values))
        self._paths: list[tuple[str, str]] = []
        self._tables: list[dict[str, Any]] = []
        for path, part in module.named_modules():
            for kind, table in (("parameter", part._parameters), ("module", part._modules)):
                self._paths.append((path, kind))
                self._tables.append(table)
        self._entries = [tuple(table.items()) for table in self._tables]
        self._sizes = list(map(len, self._tables))
        self._filled = [table for table in self._tables if table]
        self._objects = self._held()

    def check(self, training: bool, lent: bool) -> None:
        """Raise ValueError for what has changed. In evaluation it does not matter which parameters are trained."""
        if list(map(len, self._tables)) != self._sizes or not all(map(is_, self._held(), self._objects)):
            raise ValueError(self._replaced())
        if training and list(map(_is_trained, self._values)) != self._trained:
            raise ValueError(self._switched())
        if training and (any(map(_hooks, self._values)) or any(map(_late_hooks, self._values))):
            refuse_hooks(self.parameters.items())
        if not lent and list(map(torch.Tensor.data_ptr, self._values)) != self._memory:
            raise ValueError(self._moved())

    def _held(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._filled)))

    def _replaced(self) -> str:
        for (path, kind), table, entries in zip(self._paths, self._tables, self._entries):
            before, dot = dict(entries), "." if path else ""
            for name in [*before, *(n for n in table if n not in before)]:
                if table.get(name) is not before.get(name):
                    was, now = before.get(name), table.get(name)
                    what = "removed" if now is None else "added" if was is None else "replaced or tied to another"
                    return (
                        f"{kind} '{path}{dot}{name}' was {what} after the parameters were placed on their "
                        "ranks (at the first batch), so that it would not be trained: change the model before "
                        "`prepare`; values are written in place (see docs/models.md)"
                    )
        return "parameters or modules were put into another order after they were placed: change the model before that"

    def _switched(self) -> str:
        name, parameter = next(
            (n, p) for (n, p), t in zip(self.parameters.items(), self._trained) if p.requires_grad != t
        )
        return (
            f"requires_grad of parameter '{name}' was set to {parameter.requires_grad} after the parameters were "
            "placed on their ranks (at the first batch), with room for the gradients there are: freeze "
            "before `prepare`; to change it later, save the model and go on in a new run, or freeze by a learning rate "
            "of 0 in a parameter group of its own"
        )

    def _moved(self) -> str:
        name = next(n for (n, p), m in zip(self.parameters.items(), self._memory) if p.data_ptr() != m)
        return (
            f"parameter '{name}' was given other memory (`parameter.data = ...`, `vector_to_parameters`, "
            "`model.to(...)`, `model.half()`), which the engine does not compute with: write in place, "
            "`parameter.data.copy_(...)`, to the parameters in `model.named_parameters()`, which are those that this "
            "process holds; or load a whole state by `model.load_state_dict(...)`"
        )


def refuse_hooks_of_regions(graph: Graph, module: nn.Module) -> None:
    """Raise ValueError where a module that runs as it is has hooks: they would run in it, and around it."""
    for path in {region.path for region in graph.opaque.values()}:
        part = module.get_submodule(path)
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            # Libraries put hooks in to read what passes.
            if getattr(hook, "__module__", "").partition(".")[0] not in _LIBRARIES:
                raise ValueError(
                    f"module '{path}' has a forward hook ({getattr(hook, '__qualname__', hook)}), and cannot be "
                    "captured, so that it runs as it is written: the hook would run twice. Put what the hook does into "
                    "the module's forward, or put the hook on a module inside of it"
                )


def refuse_hooks(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise ValueError where a parameter has hooks: gradients reach it in another way, which would not call them."""
    for name, parameter in parameters:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            if not parameter.requires_grad:
                continue
            kind = "register_hook" if parameter._backward_hooks else "register_post_accumulate_grad_hook"
            raise ValueError(
                f"parameter '{name}' has a hook (`{kind}`), which would never run: the engine computes gradients and "
                "adds them to `.grad` itself. Remove the hook, and change gradients after `loss.backward()`, in "
                "`model.named_parameters()`"
            )
