"""Find what depends on the number of samples by comparing two exports of the same step.

Symbolic export fails where a model branches on a size; two plain exports that differ only in the number of samples do
not. Where a size or an integer argument differs between them, it must be proportional to the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_aggregate

from ..errors import CaptureError, where
from ..graph import ValueSpec


class PerSample(int):
    """An integer argument that is `int(self)` times the number of samples."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{int(self)}*samples"


def merge(small: fx.Graph, large: fx.Graph, samples: tuple[int, int]) -> None:
    """Mark in `small` what differs from `large`: ``PerSample`` arguments, and ``meta["spec"]`` of every tensor.

    The two graphs were exported with `samples` samples each.

    Raises:
        CaptureError: when the operations differ, or a number depends on the number of samples in another way.
    """
    first, second = list(small.nodes), list(large.nodes)
    for a, b in zip(first, second):
        if a.op != b.op or (str(a.target) != str(b.target) and a.op == "call_function"):
            raise CaptureError(f"the operations of {where(a)} depend on the number of samples ({a.target}, {b.target})")
    if len(first) != len(second):
        raise CaptureError(f"the number of operations depends on the number of samples ({len(first)}, {len(second)})")
    for a, b in zip(first, second):
        a.meta["spec"] = _spec(a, b, samples)
        if isinstance(a.meta.get("val"), (tuple, list)):
            a.meta["batched"] = _shapes(a) != _shapes(b)
        if a.op == "call_function":
            a.args = _merge_arguments(a.args, b.args, a, samples)
            a.kwargs = _merge_arguments(a.kwargs, b.kwargs, a, samples)


def resolve(arguments: Any, samples: int) -> Any:
    """`arguments` of a node with ``PerSample`` numbers filled in."""
    return map_aggregate(arguments, lambda x: int(x) * samples if isinstance(x, PerSample) else x)


def spec(node: fx.Node) -> ValueSpec | None:
    """The spec of a tensor-valued node; None for tuples and numbers."""
    return node.meta.get("spec")


def batched(node: fx.Node) -> bool | None:
    """Whether a tensor (or a tuple of tensors) differs between samples; None for numbers."""
    own = spec(node)
    return own.batch_dim is not None if own is not None else node.meta.get("batched")


def _spec(a: fx.Node, b: fx.Node, samples: tuple[int, int]) -> ValueSpec | None:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return None
    assert x.dtype == y.dtype
    differing = [d for d in range(x.dim()) if x.shape[d] != y.shape[d]]
    if not differing:
        return ValueSpec(tuple(x.shape), x.dtype, None, 0, False)
    if len(differing) > 1:
        raise CaptureError(
            f"{where(a)} makes a tensor of samples x samples ({a.target}): the loss compares the samples of a batch "
            "with each other, and a split batch would give another loss"
        )
    dim = differing[0]
    rows = _proportional(x.shape[dim], y.shape[dim], samples)
    if rows is None:
        raise CaptureError(f"size {dim} of {a.target} in {where(a)} is not a multiple of the number of samples")
    return ValueSpec(tuple(x.shape), x.dtype, dim, rows, False)


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in node.meta["val"] if isinstance(v, torch.Tensor)]


def _proportional(a: int, b: int, samples: tuple[int, int]) -> int | None:
    factor = (b - a) // (samples[1] - samples[0])
    return factor if (factor * samples[0], factor * samples[1]) == (a, b) else None


def _merge_arguments(a: Any, b: Any, node: fx.Node, samples: tuple[int, int]) -> Any:
    if isinstance(a, fx.Node):
        return a
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return type(a)(_merge_arguments(x, y, node, samples) for x, y in zip(a, b))
    if isinstance(a, Mapping):
        return {k: _merge_arguments(a[k], b[k], node, samples) for k in a}
    if a == b:
        return a
    if isinstance(a, int) and isinstance(b, int) and not isinstance(a, bool):
        factor = _proportional(a, b, samples)
        if factor is not None:
            return PerSample(factor)
    raise CaptureError(
        f"{node.target} in {where(node)} uses a number that depends on the number of samples ({a} for {samples[0]}, "
        f"{b} for {samples[1]})"
    )
