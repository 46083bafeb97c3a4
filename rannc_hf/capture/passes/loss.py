"""The loss over the global batch: any split into microbatches and replicas adds up to one process's loss.

A mean over samples becomes a sum divided by a count over the *global* batch (`GlobalCount`). The count is an input of
the graph, so each slice of the batch contributes ``sum(slice) / count(all)``. Everything after such sums must be
linear, or the contributions would not add up.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx as fx

from ..errors import CaptureError, where
from ..opaque.operation import is_opaque
from .counts import Counts, count_in_preamble, is_reduction, mean_to_sum
from .linear import check_linear, share
from .per_sample import SAMPLES, PerSample, batched, spec
from .schema import argument, name_of, with_arguments

_aten = torch.ops.aten
_NONE, _MEAN, _SUM = 0, 1, 2
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_CLASSIFICATION = ("aten.cross_entropy_loss", "aten.nll_loss_nd", "aten.nll_loss", "aten.nll_loss2d")
_LOSSES = (
    *_CLASSIFICATION, "aten.mse_loss", "aten.l1_loss", "aten.smooth_l1_loss", "aten.huber_loss",
    "aten.binary_cross_entropy", "aten.binary_cross_entropy_with_logits", "aten.soft_margin_loss", "aten.kl_div",
    "aten.margin_ranking_loss", "aten.hinge_embedding_loss", "aten.cosine_embedding_loss", "aten.triplet_margin_loss",
    "aten.multi_margin_loss", "aten.multilabel_margin_loss", "aten.poisson_nll_loss",
)  # fmt: skip


def globalize(graph: fx.Graph, counts: Counts, loss: fx.Node | None) -> set[fx.Node]:
    """Rewrite every reduction over samples so that the results for slices of a batch add up to that of the whole.

    Returns the nodes that hold a sum over the samples of a slice. `loss` is made one of them: where it is the same for
    all samples, each slice contributes its share.

    Raises:
        CaptureError: for a reduction over samples that does not add up over slices of the batch.
    """
    return _Globalizer(graph, counts).run(loss)


class _Globalizer:
    def __init__(self, graph: fx.Graph, counts: Counts) -> None:
        self.graph, self.counts = graph, counts
        self.linear: set[fx.Node] = set()
        self.widened: set[fx.Node] = set()

    def run(self, loss: fx.Node | None) -> set[fx.Node]:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node in self.counts.local:
                continue
            kind = node.meta.get("opaque_kind")
            if any(n in self.linear for n in node.all_input_nodes):
                check_linear(node, self.linear, self.counts)
                self.linear.add(node)
            elif kind is not None or is_opaque(node):
                self.opaque(node, kind)
            elif is_reduction(node) and node in self.counts.preamble:
                count_in_preamble(node, self.counts)
            elif is_reduction(node):
                self.reduction(node)
            elif name_of(node) in _LOSSES:
                self.widen(node)
        if loss is not None and loss not in self.linear and batched(loss) is False:
            output = next(n for n in self.graph.nodes if n.op == "output")
            # Its mean, if it had one, has taken its place among the outputs and is in `linear`.
            if loss in output.all_input_nodes:
                shared = share(output, loss, self.counts)
                output.replace_input_with(loss, shared)
                self.linear.add(shared)
        self.propagate()
        return self.linear

    def opaque(self, node: fx.Node, kind: str | None) -> None:
        """A result of an opaque region, of which numbers have shown what it is over the samples."""
        if kind not in ("sum", "mean"):
            return
        if node in self.counts.preamble:
            raise CaptureError(
                f"{where(node)} runs as it is, and computes one value from the fields of all samples of the batch"
            )
        if kind == "sum":
            self.linear.add(node)
            return
        with self.graph.inserting_after(node):
            local = self.counts.emit(node, _aten.mul.Tensor, (node, PerSample(1)))
        with self.graph.inserting_after(local):
            mean = self.counts.emit(node, _aten.div.Tensor, (local, self.counts.samples()))
        node.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not local)
        self.linear |= {local, mean}

    # -- reductions ----------------------------------------------------------------------------------------------

    def reduction(self, node: fx.Node) -> None:
        name = name_of(node)
        if name in _LOSSES:
            self.loss(node)
        elif name in ("aten.mean", "aten.sum") and isinstance(node.args[0], fx.Node):
            self.mean_or_sum(node)
        else:
            of = f" of {node.args[0].target}" if isinstance(node.args[0], fx.Node) and "getitem" in name else ""
            raise CaptureError(
                f"{name}{of} in {where(node)} computes one value from all samples of the batch; rannc splits the "
                "batch, and only sums and means over samples add up to the loss of the whole batch"
            )

    def loss(self, node: fx.Node) -> None:
        reduction = argument(node, "reduction")
        count = self.loss_count(node) if reduction == _MEAN else None
        self.widen(node)
        node.args, node.kwargs = with_arguments(node, reduction=_SUM)
        self.linear.add(node)
        if count is not None:
            self.divide(node, count)

    def loss_count(self, node: fx.Node) -> fx.Node:
        """What the mean of a loss divides by."""
        target = node.args[1]
        assert isinstance(target, fx.Node)
        target_spec = spec(target)
        assert target_spec is not None
        if name_of(node) in _CLASSIFICATION and not target_spec.dtype.is_floating_point:
            return self.label_count(node, target)
        elements: torch.Tensor = self.counts.compute(node, reduction=_NONE)
        return self.counts.samples(elements.numel() // SAMPLES[0])

    def label_count(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """How many targets a classification loss averages over (their weight, where classes have weights)."""
        weight, ignored = argument(node, "weight"), argument(node, "ignore_index")
        preamble, emit = self.counts.preamble, self.counts.emit
        if target not in preamble or (weight is not None and weight not in preamble):
            raise CaptureError(f"the targets or class weights of the loss in {where(node)} depend on parameters")
        with self.graph.inserting_before(node):
            kept = emit(node, _aten.ne.Scalar, (target, ignored), target)
            if weight is not None:
                safe = emit(node, _aten.clamp_min.default, (target, 0), target)
                each = emit(node, _aten.index.Tensor, (weight, [safe]), target)
                kept = emit(node, _aten.mul.Tensor, (each, kept), target)
            total = emit(node, _aten.sum.default, (kept,))
        return self.counts.total(total)

    def mean_or_sum(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own = spec(source)
        assert own is not None and own.batch_dim is not None
        averaged = mean_to_sum(node) if name_of(node) == "aten.mean" else None
        if own.dtype in _LOW_PRECISION and "dtype" not in node.kwargs:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
            self.widened.add(node)
        self.linear.add(node)
        if averaged is not None:
            self.divide(node, self.counts.samples(averaged))

    def divide(self, node: fx.Node, count: fx.Node) -> None:
        with self.graph.inserting_after(node):
            quotient = self.graph.call_function(_aten.div.Tensor, (node, count))
        quotient.meta = dict(node.meta)
        node.replace_all_uses_with(quotient, delete_user_cb=lambda user: user is not quotient)
        self.linear.add(quotient)

    # -- precision -----------------------------------------------------------------------------------------------

    def widen(self, node: fx.Node) -> None:
        """Compute a loss in fp32, as autocast does: a loss near 10 has steps of 0.06 in bf16."""
        for i, source in enumerate(node.args):
            own = spec(source) if isinstance(source, fx.Node) else None
            if isinstance(source, fx.Node) and own is not None and own.dtype in _LOW_PRECISION:
                with self.graph.inserting_before(node):
                    node.update_arg(i, self.counts.emit(node, _aten.to.dtype, (source, torch.float32), source))
                self.widened.add(node)

    def propagate(self) -> None:
        """What is computed from a loss in fp32 is in fp32 too, unless it is cast."""
        if not self.widened:
            return
        changed = set(self.widened)
        for node in self.graph.nodes:
            own = spec(node)
            if own is None or not (node in changed or changed.intersection(node.all_input_nodes)):
                continue
            try:
                value = self.counts.compute(node)
            except RuntimeError as error:
                raise CaptureError(f"{node.target} in {where(node)} does not take the loss in fp32: {error}") from error
            if value.dtype != own.dtype or node in changed:
                node.meta.update(val=value, spec=replace(own, dtype=value.dtype))
                changed.add(node)
