"""Transformers models without memory for their parameters: from checkpoints, and in scripts that know nothing of it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn

from rannc_hf.engine.deferred import deferred_init, deferred_tensor

M = TypeVar("M", bound=nn.Module)
_PLACING = ("device_map", "quantization_config", "tp_plan")


def from_pretrained(model_class: type[M], name_or_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> M:
    """``model_class.from_pretrained(name_or_directory, ...)``, of which each process later reads its own parts alone.

        model = rannc_hf.from_pretrained(AutoModelForCausalLM, "checkpoint", dtype=torch.float32)

    Nothing but the headers of safetensors files is read now. What Transformers does between the file and the model is
    recorded: renamed keys, changes of dtype, experts put together, tied weights; what the checkpoint lacks (a new
    head) is initialised as `deferred_init` does, from the seed set before. The files must stay where they are until
    the model is partitioned. Other formats of checkpoints are read at once.

    Args:
        model_class: a model class or Auto class of Transformers; the other arguments are those of its
            `from_pretrained`, `device_map` and quantization excepted.

    Raises:
        ValueError: for `device_map` or a quantized model: the engine places the parameters itself.
    """
    unsupported = [name for name in _PLACING if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"from_pretrained: leave out {', '.join(unsupported)}: RaNNC places plain parameters itself")
    with _lazy_files():
        model: M = model_class.from_pretrained(name_or_directory, *args, **kwargs)  # type: ignore[attr-defined]
    return model


@contextlib.contextmanager
def _lazy_files() -> Iterator[None]:
    """Within it, `from_pretrained` describes what it would read."""
    from transformers import modeling_utils

    # Its reading threads would not be watched.
    synchronous = mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})
    with synchronous, mock.patch.object(modeling_utils, "safe_open", _LazyFile), deferred_init():
        yield


@dataclass(frozen=True)
class _Source:
    """A safetensors file, known by its name and size: ranks on other machines may have it in another folder."""

    path: str = field(repr=False)
    name: str
    size: int

    def read(self, key: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor


def _read(source: _Source, key: str) -> torch.Tensor:
    return source.read(key)


class _LazyFile:
    """Takes the place of `safetensors.safe_open`: whole tensors are described, and read when needed."""

    def __init__(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, *args, **kwargs)
        name = os.path.abspath(os.fspath(path))
        self._source = _Source(name, os.path.basename(name), os.path.getsize(name))

    def __enter__(self) -> _LazyFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, key: str) -> _LazySlice:
        return _LazySlice(self._source, key, self._file.get_slice(key))


class _LazySlice:
    """A tensor in a file; ``slice[...]`` is all of it."""

    def __init__(self, source: _Source, key: str, inner: Any) -> None:
        self._source, self._key, self._inner = source, key, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._inner[index]
        if index is not Ellipsis or tensor.numel() == 0:
            return tensor
        # It lies in mapped memory, of which nothing is read for its shape.
        return deferred_tensor(tensor, _read, (self._source, self._key))


# -- scripts that are left as they are -------------------------------------------------------------------------------


def defer_models() -> None:
    """From now on, build all Transformers models of this process under `deferred_init`. Doing it again does nothing.

    It covers ``Model(config)``, `from_config`, `from_pretrained` and `resize_token_embeddings`.
    """
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, "_rannc_defers"):
        return
    PreTrainedModel._rannc_defers = True
    original = PreTrainedModel.__dict__["__init_subclass__"].__func__

    @functools.wraps(original)
    def init_subclass(cls: type, **kwargs: Any) -> None:
        original(cls, **kwargs)
        _defer_class(cls)

    # Classes are defined where a script first names them.
    PreTrainedModel.__init_subclass__ = classmethod(init_subclass)
    pending = [PreTrainedModel]
    while pending:
        for cls in pending.pop().__subclasses__():
            _defer_class(cls)
            pending.append(cls)
    PreTrainedModel.resize_token_embeddings = _deferred(PreTrainedModel.resize_token_embeddings)
    loaded = PreTrainedModel.__dict__["from_pretrained"].__func__

    @functools.wraps(loaded)
    def load(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        if any(kwargs.get(name) is not None for name in _PLACING):
            # It is loaded as the script says; if it comes to be trained, the Accelerator tells what is wrong.
            return loaded(cls, *args, **kwargs)
        with _lazy_files():
            return loaded(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(load)


def _defer_class(cls: type) -> None:
    if "__init__" in cls.__dict__:
        cls.__init__ = _deferred(cls.__dict__["__init__"])  # type: ignore[misc]


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with deferred_init():
            return function(*args, **kwargs)

    return call
