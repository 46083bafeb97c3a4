"""What the user's module has of us while it is trained, and its copies have not: methods and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class NoPickle(TypeError):
    """The module is to be pickled (`torch.save(model, path)`), as a whole or a part that this process lacks."""

    def __init__(self) -> None:
        super().__init__(
            "a model that is trained in parts cannot be pickled: save its weights, on every process, by "
            "accelerator.save_model(model, directory) or accelerator.unwrap_model(model).save_pretrained(directory)"
        )


class Attached:
    """`function` as the method `name` of `module`; `original` is what was there.

    It speaks of the module that is trained. `copy.deepcopy` would hand it on to a copy (an average of the weights),
    which would then save the other one's: a copy has its class's own.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._module, self._name, self._function = module, name, function
        self.original: Callable[..., Any] = getattr(module, name)
        object.__setattr__(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        return self if copied is None else getattr(type(copied), self._name).__get__(copied)

    def __reduce__(self) -> Any:
        raise NoPickle


class Hook:
    """`function` as a hook of the module that is trained. In a copy of that it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        raise NoPickle


def nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


def is_attached(module: nn.Module, name: str) -> bool:
    """Whether the method `name` of `module` was put in the place of its class's."""
    return isinstance(module.__dict__.get(name), Attached)


def original(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method `name` of `module`, as it would be without us."""
    found = getattr(module, name)
    return found.original if isinstance(found, Attached) else found
