"""Replace in-place operations by functional ones, so that blocks are pure functions and may be recomputed.

A write to a view is written back into the tensor it views (`slice` becomes `slice_scatter`, and so on up the chain of
views), and views made before the write are made again from the new value where they are read later.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CaptureError, module_path, where
from .batch_norm import is_new_statistic
from .schema import schema
from .views import scatter

_aten = torch.ops.aten


def functionalize(
    graph: fx.Graph,
    fake_mode: FakeTensorMode,
    buffers: Mapping[str, str],
    parameters: Mapping[str, str],
    *,
    training: bool,
) -> dict[str, fx.Node]:
    """Rewrite `graph` in place; every node keeps a fake value in ``meta["val"]``.

    `buffers` and `parameters` are the names of those by placeholder. Returns the nodes that hold the new values of
    buffers that the step writes to, by placeholder.

    Raises:
        CaptureError: when the step writes to a parameter, or to a buffer in evaluation, or to a view that cannot be
            written back.
    """
    if not any(_written(n) for n in graph.nodes):
        return {}
    made = _Functionalizer(graph, fake_mode, buffers, parameters, training)
    made.run()
    return {root.name: value for root, value in made.current.items() if root.name in buffers}


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor an in-place operation writes to."""
    own = schema(node)
    if own is None or not own.is_mutable:
        return None
    written = [i for i, a in enumerate(own.arguments) if a.alias_info is not None and a.alias_info.is_write]
    target = node.args[written[0]] if len(written) == 1 and written[0] < len(node.args) else None
    changes_shape = torch.Tag.inplace_view in getattr(node.target, "tags", ()) and "detach_" not in str(node.target)
    if not isinstance(target, fx.Node) or changes_shape:
        raise CaptureError(f"{node.target} in {where(node)} writes to its arguments in a way that cannot be captured")
    return target


class _Functionalizer:
    def __init__(
        self,
        graph: fx.Graph,
        fake_mode: FakeTensorMode,
        buffers: Mapping[str, str],
        parameters: Mapping[str, str],
        training: bool,
    ) -> None:
        self.graph, self.fake_mode, self.buffers, self.parameters = graph, fake_mode, buffers, parameters
        self.training = training
        self.base: dict[fx.Node, fx.Node] = {}
        """View to the node whose memory it shares."""
        self.current: dict[fx.Node, fx.Node] = {}
        """Base to the node that holds its present value."""
        self.origin: dict[fx.Node, fx.Node] = {}
        """Node that holds a value of a base, to that base."""
        self.version: dict[fx.Node, int] = {}
        self.made_at: dict[fx.Node, int] = {}
        self.forwards: dict[fx.Node, fx.Node] = {}
        """View to the last node that made it again."""
        self.at: fx.Node

    def run(self) -> None:
        # Decided first: the rewritten graph's values no longer share memory.
        views: set[fx.Node] = set()
        for node in self.graph.nodes:
            # One of several results is a view where all of them are (`split`), and new memory otherwise (`topk`).
            if _is_view(node) and (node.target is not operator.getitem or node.args[0] in views):
                views.add(node)
        views -= _detached_alone(self.graph, views)
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                continue
            self.at = node
            with self.graph.inserting_before(node):
                node.args = fx.map_arg(node.args, self.read)
                node.kwargs = fx.map_arg(node.kwargs, self.read)
            if _written(node) is not None:
                self.write(node)
            elif node in views:
                root = self.root(node.args[0])
                self.base[node] = root
                self.made_at[node] = self.version.get(root, 0)

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` shares, itself where it shares none."""
        root = self.base.get(node, node)
        return self.origin.get(root, root)

    def read(self, node: fx.Node) -> fx.Node:
        """The node that holds the present value of what `node` was when it was made."""
        node = self.forwards.get(node, node)
        root = self.root(node)
        if node not in self.base:
            return self.current.get(root, node)
        if self.made_at[node] == self.version.get(root, 0):
            return node
        source = self.read(node.args[0])  # type: ignore[arg-type]
        again = self.emit(node.target, (source, *node.args[1:]), dict(node.kwargs))
        self.base[again], self.made_at[again] = root, self.version[root]
        self.forwards[node] = again
        return again

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A new node for the node at hand, with its fake value."""
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta = {k: v for k, v in self.at.meta.items() if k in ("nn_module_stack", "stack_trace", "no_grad")}
        with self.fake_mode:
            values = fx.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
            node.meta["val"] = target(*values[0], **values[1])
        return node

    # -- writes --------------------------------------------------------------------------------------------------

    def write(self, node: fx.Node) -> None:
        written = _written(node)
        assert written is not None
        root = self.root(written)
        self.check(node, root)
        with self.graph.inserting_before(node):
            value = self.written_value(node, written.meta["val"])
            if root.name in self.buffers and node.meta.get("no_grad") and self.depends_on_parameters(value):
                value = self.emit(_aten.detach.default, (value,))
            self.write_back(written, value, root)
        node.replace_all_uses_with(written)
        self.graph.erase_node(node)

    def check(self, node: fx.Node, root: fx.Node) -> None:
        """Refuse writes that outlive the step, and those that autograd does not see."""
        if root.name in self.buffers:
            if not self.training:
                raise CaptureError(
                    f"the forward updates buffer '{self.buffers[root.name]}' in evaluation mode, in {where(node)}: "
                    "evaluation is split over ranks, which would then have different values; update it in training "
                    "mode only"
                )
            return
        if root.name in self.parameters:
            raise CaptureError(f"the forward writes to parameter '{self.parameters[root.name]}' in {where(node)}")
        outside = node.meta.get("no_grad") and not root.meta.get("no_grad")
        if outside and self.depends_on_parameters(self.current.get(root, root)):
            raise CaptureError(
                f"{node.target} in {where(node)} writes to an activation under no_grad; write "
                "`x = x + (f(x) - x).detach()` for an operation without a gradient"
            )

    def written_value(self, node: fx.Node, old: torch.Tensor) -> fx.Node:
        """What the memory written to holds afterwards; always a node of its own."""
        if node.target is _aten.copy_.default:
            # `aten.copy` has no derivative.
            value = node.args[1]
            assert isinstance(value, fx.Node)
            if is_new_statistic(value):
                return value
            value = self.emit(_aten.expand.default, (value, list(old.shape)))
            value = self.emit(_aten._to_copy.default, (value,), {"dtype": old.dtype})
            written = node.args[0]
            assert isinstance(written, fx.Node)
            if old.dim() and written not in self.base and self.depends_on_parameters(written):
                # What is overwritten as a whole keeps a gradient, of zeros.
                value = self.emit(_aten.slice_scatter.default, (written, value, 0, 0, old.shape[0]))
            return value
        value = self.emit(_functional(node), node.args, dict(node.kwargs))
        assert value.meta["val"].shape == old.shape, node
        if value.meta["val"].dtype != old.dtype:
            value = self.emit(_aten.to.dtype, (value, old.dtype))
        return value

    def write_back(self, target: fx.Node, value: fx.Node, root: fx.Node) -> None:
        while target in self.base:
            view, source = target, target.args[0]
            assert isinstance(source, fx.Node)
            if view.target is operator.getitem:
                source = source.args[0]
                assert isinstance(source, fx.Node)
            if view.target is _aten.detach.default and self.depends_on_parameters(source):
                raise CaptureError(f"the forward writes to a detached activation in {where(self.at)}")
            value = scatter(view, source, value, self.emit)
            target = source
        self.current[root] = value
        self.origin[value] = root
        self.version[root] = self.version.get(root, 0) + 1

    def depends_on_parameters(self, node: fx.Node) -> bool:
        seen, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source.name in self.parameters:
                    return True
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False


def _is_view(node: fx.Node) -> bool:
    """Whether a node's result shares memory with its first argument; the tuple of several views counts as one."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return False
    own = schema(node)
    if node.target is operator.getitem and not _memory(source) & _memories(source):
        # One of the results of an operation that is no view (`topk`): it has memory of its own.
        return False
    may = node.target is operator.getitem or (own is not None and any(r.alias_info is not None for r in own.returns))
    # `reshape`, `contiguous` and `to` are views only sometimes: their memory tells.
    return may and not (own is not None and own.is_mutable) and bool(_memory(node) & _memory(source))


def _detached_alone(graph: fx.Graph, views: set[fx.Node]) -> set[fx.Node]:
    """Detached tensors whose memory is seen through nothing else from then on, which are as good as copies.

    Writes to them then need not go back to the tensor that they come from: in that, they would have no gradient.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    shared: dict[fx.Node, list[fx.Node]] = {}
    """Nodes that show the same memory, so far."""
    alone: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.args[0] if node in views else _written(node)
        shared[node] = before = shared[source] if isinstance(source, fx.Node) else []
        if node in views and node.target is _aten.detach.default:
            outside = any(n.op in ("placeholder", "get_attr") for n in before)
            if not outside and not any(position[u] > position[node] for n in before for u in n.users):
                alone.add(node)
        before.append(node)
    return alone


def _given(operation: Any) -> list[tuple[str, str]]:
    """Names and types of an operation's arguments after the first."""
    return [(a.name, str(a.type)) for a in operation._schema.arguments[1:]]


def _memory(node: fx.Node) -> set[int]:
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else (values,)
    try:
        return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}
    except NotImplementedError as error:
        raise CaptureError(
            f"{node.target} in {where(node)} was recorded inside of torch.vmap, where rows have no memory of their own",
            module_path(node),
        ) from error


def _memories(node: fx.Node) -> set[int]:
    """The memory of what a node works on."""
    return {memory for source in node.all_input_nodes for memory in _memory(source)}


def _functional(node: fx.Node) -> Any:
    """The functional form of an in-place operation: `add` for `add_`."""
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else ""
    plain = f"__{name[3:]}" if name.startswith("__i") else name.rstrip("_")
    overload = getattr(node.target, "_overloadname", "default") or "default"
    for candidate in (plain, f"{plain}_functional"):
        forms = getattr(_aten, candidate, None)
        # Most overloads have the same name in both; but `floor_divide_.Tensor` is `floor_divide.default`.
        others = [o for o in forms.overloads() if _given(getattr(forms, o)) == _given(node.target)] if forms else []
        for functional in [getattr(forms, o, None) for o in [overload, *others]]:
            own = getattr(functional, "_schema", None)
            first = own.arguments[0] if own is not None and not own.is_mutable else None
            # `pow.Scalar` is that of a number, to the power of a tensor.
            if first is not None and first.name in ("self", "input") and str(first.type) == "Tensor":
                return functional
    raise CaptureError(f"in-place operation {node.target} in {where(node)} has no functional form")
