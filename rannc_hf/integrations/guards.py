"""Functions of torch and accelerate that would be silently wrong on a part of a model: with these they say so.

They are put in place when this module is imported, before a script that `rannc_hf.run` starts takes them by name.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import local_sgd
from accelerate.utils import memory
from torch.nn.utils import clip_grad

from rannc_hf.engine import RanncModel

_models: weakref.WeakSet[RanncModel] = weakref.WeakSet()


def watch(model: RanncModel) -> None:
    """Refuse what would be wrong for `model` once this process holds a part of it."""
    _models.add(model)


def _in_parts(parameters: list[torch.Tensor]) -> bool:
    """Whether any of `parameters` is of a model of which this process holds a part; it may hold none."""
    given = {id(p) for p in parameters}
    for model in _models:
        if model.store is not None and len(model.store.owned) < len(model.store.originals):
            known = any(id(p) in given for p in model.store.originals.values())
            if known or not parameters:
                return True
    return False


_clip_grad_norm = clip_grad.clip_grad_norm_


@functools.wraps(_clip_grad_norm)
def _guarded_clip_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if _in_parts(given):
        raise ValueError(
            "torch.nn.utils.clip_grad_norm_ would take the norm of the gradients on this process alone, which holds a "
            "part of the model; write accelerator.clip_grad_norm_(model.parameters(), max_norm), on every process"
        )
    return _clip_grad_norm(given, *args, **kwargs)


torch.nn.utils.clip_grad_norm_ = clip_grad.clip_grad_norm_ = _guarded_clip_grad_norm


_should_reduce_batch_size = memory.should_reduce_batch_size


@functools.wraps(_should_reduce_batch_size)
def _guarded_should_reduce_batch_size(exception: Exception) -> bool:
    """Asked by `find_executable_batch_size`, on the process that is out of memory alone."""
    again: bool = _should_reduce_batch_size(exception)
    if again and any(model.transport.world_size > 1 for model in _models):
        raise ValueError(
            "this process is out of memory, and `find_executable_batch_size` would try a smaller batch here while the "
            "other processes go on; leave it out and set the batch size: the planner cuts it into microbatches that fit"
        ) from exception
    return again


memory.should_reduce_batch_size = _guarded_should_reduce_batch_size

_start_local_sgd = local_sgd.LocalSGD.__init__


@functools.wraps(_start_local_sgd)
def _guarded_local_sgd(self: Any, accelerator: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    enabled = args[1] if len(args) > 1 else kwargs.get("enabled", True)
    if enabled and isinstance(model, RanncModel):
        raise ValueError(
            "LocalSGD lets every process train a model of its own for some steps, but with RaNNC none has the whole "
            "model; leave it out, or pass enabled=False"
        )
    _start_local_sgd(self, accelerator, model, *args, **kwargs)


local_sgd.LocalSGD.__init__ = _guarded_local_sgd
