"""What a model's step depends on beside its parameters: one look at it, cheap to compare with what is there now.

That is each module's mode, the plain values among its attributes and those of its config, functions it was given,
tensors that are neither parameters nor buffers, what its buffers are like, and its hooks.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

import torch
from torch import nn

from rannc_hf.engine.batch import digest

MODE = "training or evaluation"
"""What the mode of a module is noted as, where it is not that of the whole model."""
_INTERNAL = frozenset(nn.Module().__dict__)
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
}
_SCALARS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, enum.Enum)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_LARGEST = 4096
"""Entries of a list or table up to which it is looked at."""
_DEEPEST = 3
"""Configs within configs that are looked at."""
_NOT_OURS = ("_rannc", "_is_hf_initialized", "generation_config")
"""Attributes that no forward asks for."""


class Look:
    """What a model was at one time.

    Args:
        model: the model.
        names: numbers objects that only their identity tells apart; one for all looks at a model.
        hooks: ids of hooks that are not the script's, and left out.
        own: attributes that are not the script's, and left out.
    """

    def __init__(
        self, model: nn.Module, names: Names, hooks: Collection[int] = (), own: Collection[str] = frozenset()
    ) -> None:
        self.values: dict[str, str] = {}
        """What was found, by where: "layers.1.drop.p" is "0.1"."""
        self._names, self._left_out, self._own, self._root = names, hooks, own, model
        # All values that are compared by identity, in columns: so that no step of the comparison is Python's.
        self._spaces: list[dict[str, Any]] = []
        self._getters: list[Any] = []
        self._objects: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._hooks: list[Mapping[int, Any]] = []
        self.hooks: set[int] = set()
        """Ids of all hooks."""
        state = {id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())}
        seen: set[int] = set()
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            self._module(prefix, module)
            for name, value in self._space(prefix, module.__dict__, state):
                self._config(f"{prefix}{name}", value, seen, state, 0)
        self._tables: list[Mapping[Any, Any]] = [*self._spaces, *self._hooks]
        self._sizes = list(map(len, self._tables))

    def holds(self) -> bool:
        """Whether nothing has changed since; False where it is not certain. Fast: called before every step."""
        try:
            return (
                list(map(len, self._tables)) == self._sizes
                and all(map(is_, chain.from_iterable(map(call, self._getters, self._spaces)), self._objects))
                and all(now == before for now, before in self._containers)
                and all(version_of(tensor) == version for tensor, version in self._tensors)
            )
        except Exception:
            # An attribute is gone, or cannot be compared.
            return False

    # -- one module ----------------------------------------------------------------------------------------------

    def _module(self, prefix: str, module: nn.Module) -> None:
        """Its mode, buffers and hooks."""
        if module.training != self._root.training:
            self.values[f"{prefix}{MODE}"] = "not that of the model"
        space = module.__dict__
        if module._buffers:
            self._compared(module._buffers, tuple(module._buffers))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self.values[f"{prefix}{name}"] = f"a buffer {tuple(buffer.shape)} of {buffer.dtype}"
        for table, words in _HOOKS.items():
            hooks = space[table]
            self._hooks.append(hooks)
            if hooks:
                self._containers.append((hooks, dict(hooks)))
                self.hooks.update(hooks)
                found = [self._names.of(f"{prefix}{words}", h) for key, h in hooks.items() if key not in self._left_out]
                if found:
                    self.values[f"{prefix}{words}"] = ", ".join(found)

    def _space(self, prefix: str, space: dict[str, Any], state: Collection[int]) -> Iterator[tuple[str, Any]]:
        """Note the attributes in `space`; yields what may be a config."""
        own = self._own
        names = [n for n in space if n not in _INTERNAL and not n.startswith(_NOT_OURS) and f"{prefix}{n}" not in own]
        # Some modules tell the mode of another one (those that `torch.compile` makes), which is compared itself.
        self._compared(space, (*names, "training") if "training" in space and "_modules" in space else names)
        for name in names:
            value = space[name]
            if isinstance(value, torch.Tensor):
                if id(value) not in state and not isinstance(value, nn.Parameter):
                    self._tensors.append((value, version_of(value)))
                    self.values[f"{prefix}{name}"] = self._names.of(f"{prefix}{name}", value)
            elif isinstance(value, _FUNCTIONS):
                self.values[f"{prefix}{name}"] = self._names.of(f"{prefix}{name}", value)
            elif _is_plain(value):
                self.values[f"{prefix}{name}"] = _spelled(value)
                if isinstance(value, _CONTAINERS) and not isinstance(value, (tuple, frozenset)):
                    self._containers.append((value, deepcopy(value)))
            elif name.endswith(("config", "cfg", "args", "hparams")):
                yield name, value

    def _compared(self, space: dict[str, Any], names: Sequence[str]) -> None:
        """Let `holds` compare the size of `space`, and these entries."""
        # With a single name it would give no tuple.
        get = itemgetter(*names, names[0]) if names else lambda _: ()
        self._spaces.append(space)
        self._getters.append(get)
        self._objects += get(space)

    def _config(self, path: str, value: Any, seen: set[int], state: Collection[int], depth: int) -> None:
        """Note what is in a config, once where several modules share it."""
        space = getattr(value, "__dict__", None)
        if id(value) in seen or not isinstance(space, dict) or isinstance(value, (nn.Module, type)):
            return
        seen.add(id(value))
        for name, inner in self._space(f"{path}.", space, state):
            if depth < _DEEPEST:
                self._config(f"{path}.{name}", inner, seen, state, depth + 1)


class Names:
    """Names for functions and tensors of a place, which are told apart by which object they are.

    Ranks whose models are changed alike give the same names.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[Any, str]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def of(self, place: str, thing: Any) -> str:
        """The name of a function or tensor found at `place`; a tensor's tells what is in it too."""
        known = self._known.get((place, id(thing)))
        if known is None or known[0]() is not thing:
            kind = _kind(thing)
            number = self._counts[place, kind] = self._counts.get((place, kind), 0) + 1
            known = _reference(thing), f"{kind} ({number})"
            self._known[place, id(thing)] = known
        return f"{known[1]}, {_contents(thing)}" if isinstance(thing, torch.Tensor) else known[1]


def version_of(tensor: torch.Tensor) -> int:
    """Counts writes to a tensor; an inference tensor does not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _reference(thing: Any) -> Any:
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _kind(thing: Any) -> str:
    if isinstance(thing, torch.Tensor):
        return f"a tensor {tuple(thing.shape)} of {thing.dtype}"
    inner = thing.func if isinstance(thing, functools.partial) else thing
    return f"{getattr(inner, '__module__', None)}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def _contents(tensor: torch.Tensor) -> str:
    """What is in a tensor: its number, or a digest."""
    if tensor.is_meta or type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
        return ""
    return str(tensor.item()) if tensor.numel() == 1 and not tensor.dtype.is_complex else digest(tensor)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers, words and the like."""
    if isinstance(value, _SCALARS):
        return True
    if not isinstance(value, _CONTAINERS) or len(value) > _LARGEST or depth > _DEEPEST:
        return False
    entries = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return all(_is_plain(entry, depth + 1) for entry in entries)


def _spelled(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, (set, frozenset)) else repr(value)
