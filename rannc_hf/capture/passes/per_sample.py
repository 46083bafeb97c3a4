"""Find what depends on the number of samples by comparing two exports of the same step.

Symbolic export fails where a model branches on a size; two plain exports that differ only in the number of samples do
not. Where a size or a number differs between them, it must be proportional to the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate

from ..errors import CaptureError, blamed, module_path, where
from ..graph import ValueSpec

SAMPLES = (3, 8)
"""The two sample counts that are compared. Neither is 1, which models may treat as a special case, and their halves,
thirds and remainders are not in the ratio of 3 to 8: a number made from them is noticed."""


class PerSample(int):
    """An integer argument that is `int(self)` times the number of samples."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{int(self)}*samples"


def merge(
    small: fx.Graph,
    large: fx.Graph,
    constants: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
) -> None:
    """Mark in `small` what differs from `large`: ``PerSample`` arguments, and ``meta["spec"]`` of every tensor.

    The two graphs were exported with `SAMPLES` samples; `constants` are the tensors written into each by placeholder.
    A constant that is proportional to the number of samples gets it as ``meta["per_sample"]``.

    Raises:
        CaptureError: when the operations differ, or a number depends on the number of samples in another way.
    """
    first, second = list(small.nodes), list(large.nodes)
    for node in first:
        _check_static(node)
    for a, b in zip(first, second):
        if a.op != b.op or (a.op == "call_function" and str(a.target) != str(b.target)):
            own = _blamed_for_difference(a, b, constants)
            raise CaptureError(
                f"the operations of {where(own)} depend on the number of samples ({a.target}, {b.target})",
                module_path(own),
            )
    if len(first) != len(second):
        raise CaptureError(f"the number of operations depends on the number of samples ({len(first)}, {len(second)})")
    same = dict(zip(first, second))
    for a, b in zip(first, second):
        a.meta["spec"] = _spec(a, b)
        if isinstance(a.meta.get("val"), (tuple, list)):
            a.meta["batched"] = _shapes(a) != _shapes(b)
        if a.op == "call_function":
            a.args = _merge_arguments(a.args, b.args, a, same)
            a.kwargs = _merge_arguments(a.kwargs, b.kwargs, a, same)
        elif a.name in constants[0]:
            _merge_constant(a, constants[0][a.name], constants[1][b.name])


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


def _blamed_for_difference(
    a: fx.Node, b: fx.Node, constants: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
) -> fx.Node:
    """Which node says where two graphs part: `a`, or what uses the first constant that one of them lacks."""
    if a.op == b.op:
        return a
    nodes = [*a.graph.nodes, *b.graph.nodes]
    lacking = constants[0].keys() ^ constants[1].keys()
    return next((next(iter(n.users)) for n in nodes if n.op == "placeholder" and n.name in lacking and n.users), a)


def _check_static(node: fx.Node) -> None:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    if any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values):
        raise CaptureError(
            f"{node.target} in {where(node)} reads a number out of a tensor: keep it a tensor, or compute it from the "
            "batch in the data collator and pass it as a field",
            module_path(node),
        )
    if any(isinstance(v, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in v.shape) for v in values):
        raise CaptureError(
            f"the size of the result of {node.target} in {where(node)} depends on the values in the batch: use "
            "torch.where or a multiplication with the mask in the place of indexing with it",
            module_path(node),
        )


def _spec(a: fx.Node, b: fx.Node) -> ValueSpec | None:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return None
    if x.dtype != y.dtype or x.dim() != y.dim():
        raise CaptureError(f"dtype or dimensions of {a.target} in {where(a)} depend on the number of samples")
    differing = [d for d in range(x.dim()) if x.shape[d] != y.shape[d]]
    if not differing:
        return ValueSpec(tuple(x.shape), x.dtype, None, 0, False)
    if len(differing) > 1:
        raise CaptureError(
            f"{where(a)} makes a tensor of samples x samples ({a.target}): the loss compares the samples of a batch "
            "with each other, and a split batch would give another loss"
        )
    dim = differing[0]
    rows = proportional(x.shape[dim], y.shape[dim])
    if rows is None:
        raise CaptureError(
            f"size {dim} of {a.target} in {where(a)} is not a multiple of the number of samples", blamed(a)
        )
    shape = tuple(rows if d == dim else n for d, n in enumerate(x.shape))
    return ValueSpec(shape, x.dtype, dim, rows, False)


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in node.meta["val"] if isinstance(v, torch.Tensor)]


def proportional(a: float, b: float) -> int | None:
    """The number of which `a` and `b` are `SAMPLES` times."""
    small, large = SAMPLES
    if not (math.isfinite(a) and math.isfinite(b)):
        return None
    factor = a / small
    return int(factor) if factor == int(factor) and factor * large == b else None


def _merge_constant(node: fx.Node, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.requires_grad:
        raise CaptureError(
            f"the forward uses a tensor of shape {tuple(a.shape)} that requires a gradient and is not a parameter of "
            "the model: register it with register_parameter"
        )
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
        return
    if a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
        return
    factor = proportional(a.item(), b.item()) if a.numel() == b.numel() == 1 else None
    if factor is None:
        user = next(iter(node.users))
        raise CaptureError(
            f"{where(user)} makes a tensor of numbers that differ with the number of samples, or from call to call "
            f"({a.flatten()[:8].tolist()}, {b.flatten()[:8].tolist()})"
        )
    node.meta["per_sample"] = factor


def _merge_arguments(a: Any, b: Any, node: fx.Node, same: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(a, fx.Node):
        if same[a] is not b:
            raise CaptureError(f"what {node.target} in {where(node)} works on depends on the number of samples")
        return a
    if isinstance(a, Sequence) and not isinstance(a, str) and isinstance(b, Sequence) and len(a) == len(b):
        return type(a)(_merge_arguments(x, y, node, same) for x, y in zip(a, b))  # type: ignore[call-arg]
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return {k: _merge_arguments(a[k], b[k], node, same) for k in a}
    if a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
        return a
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        factor = proportional(a, b)
        if factor is not None:
            return PerSample(factor)
    raise CaptureError(
        f"{node.target} in {where(node)} uses a number that depends on the number of samples ({a} for {SAMPLES[0]}, "
        f"{b} for {SAMPLES[1]}) and is not a multiple of it; to divide by the batch size, write `x / batch_size`"
    )
