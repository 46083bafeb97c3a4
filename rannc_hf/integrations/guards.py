"""Functions of torch that would be silently wrong on a part of a model: with these they say so.

They are put in place when this module is imported, before a script that `rannc_hf.run` starts takes them by name.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
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
