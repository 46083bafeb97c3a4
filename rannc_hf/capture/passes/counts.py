"""Numbers of the whole batch as inputs of the graph: how many samples, how many labels.

A slice of the batch cannot count them; the engine does, and passes them to every slice (`GlobalCount`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CaptureError, where
from ..graph import GlobalCount, ValueSpec
from .per_sample import SAMPLES, PerSample, batched, resolve, spec
from .schema import FILLS, argument, has_argument, name_of, position_of, schema, with_arguments

_aten = torch.ops.aten


class Counts:
    """Adds global counts, and nodes in general, to a graph. New inputs join `preamble`.

    Operations in `local` keep counting the samples of their slice.
    """

    def __init__(
        self,
        graph: fx.Graph,
        preamble: set[fx.Node],
        fake_mode: FakeTensorMode,
        local: Collection[fx.Node] = frozenset(),
    ) -> None:
        self.graph, self.preamble, self.fake_mode, self.local = graph, preamble, fake_mode, local
        self.made: list[GlobalCount] = []
        self._known: dict[tuple[fx.Node | None, int], fx.Node] = {}

    def samples(self, per_sample: int = 1) -> fx.Node:
        """`per_sample` times the number of samples of the whole batch, int64."""
        return self._get(None, per_sample, (), torch.int64)

    def total(self, node: fx.Node) -> fx.Node:
        """The sum over the whole batch of `node`, a preamble node that sums over the samples of a slice."""
        own = spec(node)
        assert own is not None and own.batch_dim is None
        return self._get(node, 0, own.shape, own.dtype)

    def _get(self, node: fx.Node | None, per_sample: int, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        key = (node, per_sample)
        if key not in self._known:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                placeholder = self.graph.placeholder(f"global_count_{len(self.made)}")
            placeholder.meta["spec"] = ValueSpec(shape, dtype, None, 0, False)
            with self.fake_mode:
                placeholder.meta["val"] = torch.empty(shape, dtype=dtype)
            self.made.append(GlobalCount(placeholder.name, node.name if node is not None else None, per_sample))
            self._known[key] = placeholder
            self.preamble.add(placeholder)
        return self._known[key]

    def emit(
        self, at: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """A node where the graph inserts, for `at`, with its samples as in `like` (None: not batched)."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in at.meta.items() if k in ("nn_module_stack", "stack_trace")}
        value = self.compute(node)
        own = spec(like) if like is not None else None
        dim, rows = (own.batch_dim, own.rows) if own is not None else (None, 0)
        shape = tuple(rows if d == dim else n for d, n in enumerate(value.shape))
        node.meta.update(val=value, spec=ValueSpec(shape, value.dtype, dim, rows, False))
        if self.preamble.issuperset(node.all_input_nodes):
            self.preamble.add(node)
        return node

    def compute(self, node: fx.Node, **changed: Any) -> Any:
        """The fake value of `node` for the smaller number of samples, with the positional arguments `changed`."""
        args, kwargs = with_arguments(node, **changed) if changed else (node.args, dict(node.kwargs))
        args, kwargs = resolve((args, kwargs), SAMPLES[0])
        args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        with self.fake_mode:
            return target(*args, **kwargs)


def count_samples(counts: Counts) -> None:
    """Where the number of samples is a value, not a size (``x / batch_size``), take that of the whole batch.

    Raises:
        CaptureError: for operations that take such a number but no tensor.
    """
    for node in list(counts.graph.nodes):
        if node in counts.local:
            continue
        if "per_sample" in node.meta:
            node.replace_all_uses_with(counts.samples(node.meta["per_sample"]), lambda user: user not in counts.local)
            if node.users:
                raise CaptureError(
                    f"a buffer is updated by a tensor made of the number of samples, in {where(next(iter(node.users)))}"
                    ": compute with the number itself, `x / len(x)`"
                )
        elif node.op == "call_function" and name_of(node) != "aten.arange":
            _count_in_arguments(node, counts)


def _count_in_arguments(node: fx.Node, counts: Counts) -> None:
    for declared in schema(node).arguments if schema(node) is not None else ():
        kind = str(declared.real_type)
        value = argument(node, declared.name)
        if not isinstance(value, PerSample) or kind not in ("Tensor", "number", "float"):
            continue
        target = node.target if kind == "Tensor" else _takes_tensor(node, declared.name)
        if target is None or declared.kwarg_only:
            raise CaptureError(
                f"{node.target} in {where(node)} computes with the number of samples in a way that cannot be split: "
                "multiply or divide by it"
            )
        node.target = target
        node.update_arg(position_of(node, declared.name), counts.samples(int(value)))


def _takes_tensor(node: fx.Node, name: str) -> Any:
    """The overload of the operation that takes a tensor for the number `name`."""
    packet: Any = node.target.overloadpacket  # type: ignore[union-attr]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        arguments = candidate._schema.arguments
        same = [str(a.real_type) for a in arguments[:position]] == [
            str(a.real_type)
            for a in node.target._schema.arguments[:position]  # type: ignore[union-attr]
        ]
        if same and len(arguments) == len(names) and str(arguments[position].real_type) == "Tensor":
            return candidate
    return None


def count_in_preamble(node: fx.Node, counts: Counts) -> None:
    """Replace a number computed from the batch alone, such as the labels to divide by, by that of the whole batch.

    Raises:
        CaptureError: where it is not a sum or a mean.
    """
    if all(user in counts.local for user in node.users):
        return
    if name_of(node) not in ("aten.sum", "aten.count_nonzero", "aten.mean"):
        raise CaptureError(
            f"{node.target} in {where(node)} computes one value from all samples of the batch; only sums can be "
            "added up over the slices of a split batch"
        )
    users = [user for user in node.users if user not in counts.local]
    averaged = mean_to_sum(node) if name_of(node) == "aten.mean" else None
    value = counts.total(node)
    if averaged is not None:
        with counts.graph.inserting_after(node):
            value = counts.emit(node, _aten.div.Tensor, (value, counts.samples(averaged)))
    for user in users:
        user.replace_input_with(node, value)


def mean_to_sum(node: fx.Node) -> int:
    """Turn a mean over samples into a sum; the number of entries of a sample that it divides by."""
    own = spec(node.args[0])  # type: ignore[arg-type]
    assert own is not None
    dims: Any = argument(node, "dim") or range(len(own.shape))
    node.target = _aten.sum.dim_IntList if has_argument(node, "dim") else _aten.sum.default
    return math.prod(own.shape[d] for d in {d % len(own.shape) for d in dims})


def is_reduction(node: fx.Node) -> bool:
    """Whether a node takes the samples together."""
    return name_of(node) not in FILLS and batched(node) is False and any(batched(n) for n in node.all_input_nodes)
