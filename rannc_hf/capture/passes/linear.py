"""What may follow a sum over samples: only what is linear in it, or slices of the batch would not add up."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from ..errors import CaptureError, where
from .counts import Counts
from .per_sample import PerSample, batched
from .schema import argument, name_of

_aten = torch.ops.aten
_LINEAR = {
    f"aten.{name}"
    for name in (
        "neg", "to", "_to_copy", "alias", "detach", "view", "reshape", "squeeze", "unsqueeze", "clone", "sum", "mean",
        "stack", "cat", "select", "slice", "contiguous", "flatten", "expand", "permute", "transpose", "t", "unbind",
        "split", "chunk", "lift_fresh",
    )
} | {operator.getitem.__name__}  # fmt: skip


def check_linear(node: fx.Node, linear: set[fx.Node], counts: Counts) -> None:
    """Check that `node`, some of whose inputs are in `linear`, is linear in them; may rewrite its other inputs.

    Raises:
        CaptureError: naming the operation that is not.
    """
    name = name_of(node)
    plain = [n for n in node.all_input_nodes if n not in linear]
    value = node.meta.get("val")
    if name in _LINEAR and not plain and not (isinstance(value, torch.Tensor) and not value.is_floating_point()):
        return
    if name in ("aten.add", "aten.sub", "aten.rsub"):
        _share_operands(node, linear, counts, (0, 1))
    elif name == "aten.where" and node.args[0] not in linear and len(node.args) == 3:
        _share_operands(node, linear, counts, (1, 2))
    elif name in ("aten.mul", "aten.div", "aten.dot", "aten.true_divide") and argument(node, "rounding_mode") is None:
        _check_factor(node, linear)
    else:
        raise CaptureError(
            f"{name} in {where(node)} is not linear in a sum or mean over samples, so slices of the batch would not "
            "add up to the loss of the whole batch"
        )


def share(at: fx.Node, term: Any, counts: Counts) -> fx.Node:
    """Weigh a term of the loss that is the same for all samples: each slice contributes as many samples as it has."""
    with counts.graph.inserting_before(at):
        if not isinstance(term, fx.Node):
            exact = at.meta["val"].dtype == torch.float64
            dtype = torch.float64 if exact else torch.float32
            term = counts.emit(at, _aten.full.default, ([], float(term)), dtype=dtype)
        local = counts.emit(at, _aten.mul.Tensor, (term, PerSample(1)))
        return counts.emit(at, _aten.div.Tensor, (local, counts.samples()))


def _share_operands(node: fx.Node, linear: set[fx.Node], counts: Counts, positions: tuple[int, ...]) -> None:
    if name_of(node) == "aten.rsub":
        node.target = _aten.rsub.Tensor
    for i in positions:
        operand = node.args[i]
        if operand in linear or (not isinstance(operand, fx.Node) and operand == 0):
            continue
        if isinstance(operand, fx.Node) and batched(operand):
            raise CaptureError(f"{node.target} in {where(node)} combines a sum over samples with values of each sample")
        node.update_arg(i, share(node, operand, counts))


def _check_factor(node: fx.Node, linear: set[fx.Node]) -> None:
    a, b = node.args[:2]
    if b in linear and (a in linear or "div" in str(node.target)):
        raise CaptureError(
            f"{node.target} in {where(node)} is not linear: it multiplies or divides sums over samples with each "
            "other, so slices of the batch would not add up to the loss of the whole batch"
        )
    factor = b if a in linear else a
    if isinstance(factor, fx.Node) and batched(factor):
        raise CaptureError(f"{node.target} in {where(node)} multiplies a sum over samples by a value of each sample")
