"""The loss over the global batch: any split into microbatches and replicas adds up to one process's loss.

A mean over samples becomes a sum divided by a count over the *global* batch (`GlobalCount`). The count is an input of
the graph, so each slice of the batch contributes ``sum(slice) / count(all)``. Everything after such sums must be
linear, or the contributions would not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from ..errors import CaptureError, where
from ..graph import GlobalCount, ValueSpec
from .per_sample import PerSample, batched, spec

_aten = torch.ops.aten
_MEAN, _SUM = 1, 2
_LOW_PRECISION = (torch.bfloat16, torch.float16)

_REDUCTION_POSITION = {
    "aten.cross_entropy_loss.default": 3,
    "aten.nll_loss_nd.default": 3,
    "aten.nll_loss.default": 3,
    "aten.nll_loss2d.default": 3,
    "aten.mse_loss.default": 2,
    "aten.l1_loss.default": 2,
    "aten.smooth_l1_loss.default": 2,
    "aten.huber_loss.default": 2,
    "aten.binary_cross_entropy.default": 3,
    "aten.binary_cross_entropy_with_logits.default": 4,
    "aten.soft_margin_loss.default": 2,
    "aten.kl_div.default": 2,
}
_CLASSIFICATION = ("aten.cross_entropy_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss.default",
                   "aten.nll_loss2d.default")  # fmt: skip
_LINEAR = {
    f"aten.{name}"
    for name in (
        "neg.default", "to.dtype", "to.dtype_layout", "to.device", "_to_copy.default", "alias.default", "view.default",
        "reshape.default", "squeeze.default", "squeeze.dim", "unsqueeze.default", "clone.default", "sum.default",
        "sum.dim_IntList", "mean.default", "mean.dim", "stack.default", "select.int", "contiguous.default",
        "flatten.using_ints",
    )
}  # fmt: skip


def globalize(graph: fx.Graph, preamble: set[fx.Node]) -> tuple[GlobalCount, ...]:
    """Rewrite every reduction over samples in `graph`; returns the counts it now takes as inputs.

    Raises:
        CaptureError: for a reduction over samples that does not add up over slices of the batch.
    """
    return _Globalizer(graph, preamble).run()


class _Globalizer:
    def __init__(self, graph: fx.Graph, preamble: set[fx.Node]) -> None:
        self.graph, self.preamble = graph, preamble
        self.counts: list[GlobalCount] = []
        self.known: dict[tuple[Any, ...], fx.Node] = {}
        self.linear: set[fx.Node] = set()
        self.emitted: list[fx.Node] = []

    def run(self) -> tuple[GlobalCount, ...]:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            inputs = node.all_input_nodes
            if any(n in self.linear for n in inputs):
                self.check_linear(node)
                self.widen(node)
                self.linear.add(node)
            elif batched(node) is False and any(batched(n) for n in inputs):
                if node in self.preamble:
                    self.count_in_preamble(node)
                else:
                    self.reduction(node)
        return tuple(self.counts)

    # -- counts --------------------------------------------------------------------------------------------------

    def count(self, node: fx.Node | None, per_sample: int, like: ValueSpec | None = None) -> fx.Node:
        """The graph input for a count; equal counts share one."""
        key = (node, per_sample)
        if key not in self.known:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                placeholder = self.graph.placeholder(f"global_count_{len(self.counts)}")
            placeholder.meta["spec"] = like or ValueSpec((), torch.float32, None, 0, False)
            self.counts.append(GlobalCount(placeholder.name, node.name if node is not None else None, per_sample))
            self.known[key] = placeholder
            self.preamble.add(placeholder)
        return self.known[key]

    def count_in_preamble(self, node: fx.Node) -> None:
        """A number computed from the whole batch alone, such as the labels to divide by."""
        if not node.users:
            return
        if str(node.target) not in ("aten.sum.default", "aten.sum.dim_IntList", "aten.count_nonzero.default"):
            raise CaptureError(
                f"{node.target} in {where(node)} computes one value from all samples of the batch; only sums can be "
                "added up over the slices of a split batch"
            )
        users = list(node.users)
        placeholder = self.count(node, 0, spec(node))
        for user in users:
            user.replace_input_with(node, placeholder)

    def label_count(self, node: fx.Node) -> fx.Node:
        """How many targets a classification loss averages over (their weight, where classes have weights)."""
        target, weight = node.args[1], node.args[2] if len(node.args) > 2 else None
        ignore = node.args[4] if len(node.args) > 4 else -100
        assert isinstance(target, fx.Node)
        target_spec = spec(target)
        assert target_spec is not None
        if target_spec.dtype.is_floating_point:
            logits = spec(node.args[0])  # type: ignore[arg-type]
            assert logits is not None
            classes = logits.shape[1] if len(logits.shape) > 1 else logits.shape[0]
            return self.count(None, _per_sample(target_spec) // classes)
        if target not in self.preamble or (isinstance(weight, fx.Node) and weight not in self.preamble):
            raise CaptureError(f"the targets or class weights of the loss in {where(node)} depend on parameters")
        first = len(self.emitted)
        with self.graph.inserting_before(node):
            kept = self.emit(_aten.ne.Scalar, (target, ignore), target_spec.shape, torch.bool, target_spec)
            if isinstance(weight, fx.Node):
                weight_spec = spec(weight)
                assert weight_spec is not None
                safe = self.emit(
                    _aten.clamp_min.default, (target, 0), target_spec.shape, target_spec.dtype, target_spec
                )
                each = self.emit(
                    _aten.index.Tensor, (weight, [safe]), target_spec.shape, weight_spec.dtype, target_spec
                )
                kept = self.emit(_aten.mul.Tensor, (each, kept), target_spec.shape, weight_spec.dtype, target_spec)
            total = self.emit(_aten.sum.default, (kept,), (), torch.int64 if weight is None else torch.float32, None)
        self.preamble.update(self.emitted[first:])
        return self.count(total, 0)

    def emit(
        self, target: Any, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype, like: ValueSpec | None
    ) -> fx.Node:
        node = self.graph.call_function(target, args)
        dim, rows = (like.batch_dim, like.rows) if like is not None else (None, 0)
        node.meta["spec"] = ValueSpec(tuple(shape), dtype, dim, rows, False)
        self.emitted.append(node)
        return node

    # -- reductions ----------------------------------------------------------------------------------------------

    def reduction(self, node: fx.Node) -> None:
        name = str(node.target)
        if name in _REDUCTION_POSITION:
            self.loss_reduction(node, _REDUCTION_POSITION[name])
        elif name in ("aten.mean.default", "aten.mean.dim"):
            self.mean(node)
        elif name not in ("aten.sum.default", "aten.sum.dim_IntList"):
            raise CaptureError(
                f"{name} in {where(node)} computes one value from all samples of the batch; rannc splits the batch, "
                "and only sums and means over samples add up to the loss of the whole batch"
            )
        self.linear.add(node)

    def loss_reduction(self, node: fx.Node, position: int) -> None:
        reduction = node.args[position] if len(node.args) > position else node.kwargs.get("reduction", _MEAN)
        scores = node.args[0]
        assert isinstance(scores, fx.Node)
        scores_spec = spec(scores)
        assert scores_spec is not None
        if scores_spec.dtype in _LOW_PRECISION:
            # A loss near 10 has steps of 0.06 in bf16: like autocast, compute it in fp32.
            with self.graph.inserting_before(node):
                wide = self.emit(_aten.to.dtype, (scores, torch.float32), scores_spec.shape, torch.float32, scores_spec)
            wide.meta.update({k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")})
            node.update_arg(0, wide)
            own = spec(node)
            assert own is not None
            node.meta["spec"] = replace(own, dtype=torch.float32)
        if reduction == _SUM:
            return
        if str(node.target) in _CLASSIFICATION:
            count = self.label_count(node)
        else:
            count = self.count(None, _per_sample(scores_spec))
        args = list(node.args) + [_default(node, i) for i in range(len(node.args), position + 1)]
        args[position] = _SUM
        node.args = tuple(args)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "reduction"}
        self.divide(node, count)

    def mean(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        source_spec = spec(source)
        assert source_spec is not None and source_spec.batch_dim is not None
        if str(node.target) == "aten.mean.default":
            node.target, averaged = _aten.sum.default, _per_sample(source_spec)
        else:
            rank = len(source_spec.shape)
            dims = [d % rank for d in _dims(1)(node)] or range(rank)
            other = [source_spec.shape[d] for d in dims if d != source_spec.batch_dim]
            node.target, averaged = _aten.sum.dim_IntList, source_spec.rows * math.prod(other)
        if source_spec.dtype in _LOW_PRECISION:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
            own = spec(node)
            assert own is not None
            node.meta["spec"] = replace(own, dtype=torch.float32)
        self.divide(node, self.count(None, averaged))

    def divide(self, node: fx.Node, count: fx.Node) -> None:
        own = spec(node)
        assert own is not None
        with self.graph.inserting_after(node):
            quotient = self.graph.call_function(_aten.div.Tensor, (node, count))
        quotient.meta = {**node.meta, "spec": own}
        node.replace_all_uses_with(quotient, delete_user_cb=lambda user: user is not quotient)
        self.linear.add(quotient)

    def widen(self, node: fx.Node) -> None:
        """What follows a loss that is computed in fp32 is in fp32 too, unless it is cast."""
        own = spec(node)
        sources = [spec(n) for n in node.all_input_nodes if n in self.linear]
        wide = any(s is not None and s.dtype == torch.float32 for s in sources)
        if (
            own is not None
            and own.dtype in _LOW_PRECISION
            and wide
            and not str(node.target).startswith(("aten.to.", "aten._to_copy."))
        ):
            node.meta["spec"] = replace(own, dtype=torch.float32)

    # -- linearity -----------------------------------------------------------------------------------------------

    def check_linear(self, node: fx.Node) -> None:
        name = str(node.target)
        plain = [n for n in node.all_input_nodes if n not in self.linear]
        if name in _LINEAR and not plain:
            return
        if name in ("aten.add.Tensor", "aten.sub.Tensor"):
            for i, operand in enumerate(node.args[:2]):
                self.share(node, i, operand)
            return
        if name in ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"):
            self.scale(node)
            return
        raise CaptureError(
            f"{name} in {where(node)} is not linear in a sum over samples, so slices of the batch would not add up to "
            "the loss of the whole batch"
        )

    def share(self, node: fx.Node, position: int, operand: Any) -> None:
        """A term of the loss that is the same for all samples counts once, not once a slice: weigh it by samples."""
        if operand in self.linear or operand == 0:
            return
        if isinstance(operand, fx.Node) and batched(operand):
            raise CaptureError(f"{node.target} in {where(node)} adds a sum over samples to a value of each sample")
        total = self.count(None, 1)
        own = spec(node)
        assert own is not None
        with self.graph.inserting_before(node):
            local = self.emit(_aten.mul.Tensor, (operand, PerSample(1)), own.shape, own.dtype, None)
            if not isinstance(operand, fx.Node):
                # Made after `local`, it would come too late in the graph: move it in front.
                constant = self.emit(_aten.full.default, ([], operand), (), own.dtype, None)
                local.prepend(constant)
                local.args = (constant, PerSample(1))
            shared = self.emit(_aten.div.Tensor, (local, total), own.shape, own.dtype, None)
        node.update_arg(position, shared)

    def scale(self, node: fx.Node) -> None:
        a, b = node.args[:2]
        division = "div" in str(node.target)
        if (a in self.linear and b in self.linear) or (division and b in self.linear):
            raise CaptureError(f"{node.target} in {where(node)} is not linear in a sum over samples")
        factor = b if a in self.linear else a
        if isinstance(factor, PerSample):
            if not division:
                raise CaptureError(f"{where(node)} multiplies the loss by the number of samples")
            node.update_arg(1, self.count(None, int(factor)))
            node.target = _aten.div.Tensor
        elif isinstance(factor, fx.Node) and batched(factor):
            raise CaptureError(
                f"{node.target} in {where(node)} multiplies a sum over samples by a value of each sample"
            )


def check_independent(graph: fx.Graph) -> None:
    """Refuse operations that let samples of a batch influence each other.

    Raises:
        CaptureError: naming the operation and its module.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if name in ("aten.batch_norm.default", "aten._native_batch_norm_legit.default") and node.args[5]:
            raise CaptureError(
                f"batch normalisation in training mode ({where(node)}) takes its statistics over the samples of a "
                "batch; use GroupNorm or LayerNorm, or put the module into eval mode"
            )
        along = _ALONG_DIM.get(name)
        if along is None:
            continue
        source = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
        source_spec = spec(source) if isinstance(source, fx.Node) else None
        if source_spec is None or source_spec.batch_dim is None:
            continue
        rank = len(source_spec.shape)
        if source_spec.batch_dim in [d % rank for d in along(node)]:
            raise CaptureError(f"{name} in {where(node)} works across the samples of a batch, which rannc splits")


def _dims(position: int, default: int | None = None) -> Callable[[fx.Node], list[int]]:
    def read(node: fx.Node) -> list[int]:
        value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        if value is None:
            return []
        if isinstance(value, int):
            return [value]
        assert isinstance(value, (list, tuple))
        return [int(d) for d in value]

    return read


_ALONG_DIM: dict[str, Callable[[fx.Node], list[int]]] = {
    "aten.softmax.int": _dims(1),
    "aten._softmax.default": _dims(1),
    "aten.log_softmax.int": _dims(1),
    "aten._log_softmax.default": _dims(1),
    "aten.cumsum.default": _dims(1),
    "aten.cumprod.default": _dims(1),
    "aten.sort.default": _dims(1, -1),
    "aten.topk.default": _dims(2, -1),
    "aten.flip.default": _dims(1),
    "aten.roll.default": _dims(2),
    "aten.cat.default": _dims(1, 0),
    "aten.logsumexp.default": _dims(1),
}


def _per_sample(value: ValueSpec) -> int:
    """Elements of a value that belong to one sample."""
    assert value.batch_dim is not None
    return math.prod(n for d, n in enumerate(value.shape) if d != value.batch_dim) * value.rows


def _default(node: fx.Node, position: int) -> Any:
    argument = node.target._schema.arguments[position]  # type: ignore[union-attr]
    return node.kwargs.get(argument.name, argument.default_value)
