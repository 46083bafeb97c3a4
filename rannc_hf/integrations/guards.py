"""Functions of torch and accelerate that would be silently wrong on a part of a model: with these they say so.

They are put in place when this module is imported, before a script that `rannc_hf.run` starts takes them by name.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import local_sgd
from accelerate.utils import memory
from torch.nn.utils import clip_grad
from torch.optim import swa_utils

from rannc_hf.engine import RanncModel

_models: weakref.WeakSet[RanncModel] = weakref.WeakSet()


def watch(model: RanncModel) -> None:
    """Refuse what would be wrong for `model` once this process holds a part of it."""
    _models.add(model)


def _in_parts(tensors: list[torch.Tensor]) -> bool:
    """Whether any of `tensors` is a parameter, or its gradient, of a model of which this process holds a part.

    It may hold none, so that without any it is taken to be so.
    """
    given = {id(t) for t in tensors}
    for model in _models:
        if model.store is None or model.is_whole:
            continue
        if len(model.store.owned) < len(model.store.originals):
            known = any(id(p) in given or id(p.grad) in given for p in model.store.originals.values())
            if known or not tensors:
                return True
    return False


def _guarded(norm: Callable[..., torch.Tensor], advice: str) -> Callable[..., torch.Tensor]:
    """`norm` of parameters or gradients, refused with `advice` where they are a part of a model's."""

    @functools.wraps(norm)
    def guarded(tensors: torch.Tensor | Iterable[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if _in_parts(given):
            raise ValueError(advice)
        return norm(given, *args, **kwargs)

    return guarded


torch.nn.utils.clip_grad_norm_ = clip_grad.clip_grad_norm_ = _guarded(
    clip_grad.clip_grad_norm_,
    "torch.nn.utils.clip_grad_norm_ would take the norm of the gradients on this process alone, which holds a part of "
    "the model; write accelerator.clip_grad_norm_(model.parameters(), max_norm), or without Accelerate "
    "model.clip_grad_norm_(max_norm), on every process",
)
torch.nn.utils.get_total_norm = _guarded(
    torch.nn.utils.get_total_norm,
    "torch.nn.utils.get_total_norm would take the norm on this process alone, which holds a part of the model; "
    "accelerator.clip_grad_norm_(model.parameters(), float('inf')), or without Accelerate "
    "model.clip_grad_norm_(float('inf')), on every process, returns that of all",
)

_update_average = swa_utils.AveragedModel.update_parameters


@functools.wraps(_update_average)
def _guarded_update_average(self: Any, model: torch.nn.Module) -> None:
    if _in_parts(list(model.parameters())):
        raise ValueError(
            "AveragedModel.update_parameters pairs parameters in their order, but this process holds a part of them; "
            "write `with model.whole(): average.update_parameters(model.module)`, on every process"
        )
    _update_average(self, model)


swa_utils.AveragedModel.update_parameters = _guarded_update_average  # type: ignore[method-assign]


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
