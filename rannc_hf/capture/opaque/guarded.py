"""Run code on whole numbers that no batch had, without the crash that some kernels end in.

PyTorch's operations check on a CPU that an index is inside of what it indexes. Those of other libraries need not: the
RNN-T loss of torchaudio reads the logits at any label that it is given. And on a GPU such an index ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

_OWN = ("aten", "prims", "prim", "profiler", "rannc")
_ALONG = ("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
"""Operations on (tensor, dimension, indices)."""
UNCHECKED = (
    "cannot be checked with other numbers than those of the batch: {} may read memory that is not its own, if it is "
    "given a label or length that is too large. What to try: PyTorch's own operations, or, for a loss, the script"
)


class UncheckedError(Exception):
    """Nobody knows whether an operation checks the numbers that it is given."""


class Guarded(TorchDispatchMode):
    """Raises an error before an operation is given whole numbers that it may not survive.

    `UncheckedError` for an operation of another library, `IndexError` where PyTorch's own would raise it on a CPU.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            whole = [x for x in _tensors((args, kwargs)) if _is_whole(x)]
            on_gpu = any(x.is_cuda for x in whole)
            if whole and func.namespace not in _OWN and (on_gpu or func.name().partition(".")[0] not in OPDEFS):
                raise UncheckedError(func.name())
            if whole and func.namespace == "aten" and outside(func, args, kwargs, on_gpu):
                raise IndexError(f"{func.name()} is given an index that is outside of its tensor")
        return func(*args, **kwargs)


def outside(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], on_gpu: bool) -> bool:
    """Whether an operation that does not check this itself is given an index outside of what it indexes."""
    name = func.name().partition("::")[2].partition(".")[0].rstrip("_")
    if name == "_ctc_loss":
        return _beyond(args[1], args[0].shape[-1])
    if not on_gpu:
        return False
    if name == "embedding":
        return _beyond(args[1], args[0].shape[0])
    if name in _ALONG and args[0].dim():
        return _beyond(args[2], args[0].shape[args[1]])
    if name in ("index", "index_put", "_index_put_impl", "_unsafe_index"):
        return _beyond_any(args[0], args[1])
    if name in ("take", "put"):
        return _beyond(args[1], args[0].numel(), args[0].numel())
    if name in ("nll_loss_forward", "nll_loss2d_forward"):
        target, ignored = args[1], args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
        return _beyond(target[target != ignored], args[0].shape[1 if args[0].dim() > 1 else 0])
    return name == "repeat_interleave" and bool((_tensors(args)[-1] < 0).any())


def _beyond_any(value: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> bool:
    dim = 0
    for index in indices:
        if index is not None and _is_whole(index) and index.dtype != torch.uint8:
            size = value.shape[dim]
            if _beyond(index, size, size):
                return True
        dim += index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
    return False


def _beyond(index: torch.Tensor, size: int, from_the_end: int = 0) -> bool:
    return bool(((index < -from_the_end) | (index >= size)).any())


def _is_whole(value: torch.Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
