"""Replace in-place operations by functional ones, so that blocks are pure functions and may be recomputed.

A write to a view is written back into the tensor it views (`slice` becomes `slice_scatter`, and so on up the chain of
views), and views made before the write are made again from the new value where they are read later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CaptureError, where

_aten = torch.ops.aten


def functionalize(graph: fx.Graph, fake_mode: FakeTensorMode, buffers: dict[str, str]) -> None:
    """Rewrite `graph` in place; every node keeps a fake value in ``meta["val"]``.

    Raises:
        CaptureError: when the step writes to a buffer, or to a view that cannot be written back.
    """
    if any(_written(n) for n in graph.nodes):
        _Functionalizer(graph, fake_mode, buffers).run()


def _schema(node: fx.Node) -> torch._C.FunctionSchema | None:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor an in-place operation writes to."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable:
        return None
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != 1 or written[0] >= len(node.args) or not isinstance(node.args[written[0]], fx.Node):
        raise CaptureError(f"{node.target} in {where(node)} writes to its arguments in a way that cannot be captured")
    target = node.args[written[0]]
    assert isinstance(target, fx.Node)
    return target


def _viewed(node: fx.Node) -> fx.Node | None:
    """The tensor that a node's result may share memory with."""
    schema = _schema(node)
    if schema is None or schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    shares = any(r.alias_info is not None for r in schema.returns)
    return node.args[0] if shares and isinstance(node.meta.get("val"), torch.Tensor) else None


class _Functionalizer:
    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode, buffers: dict[str, str]) -> None:
        self.graph, self.fake_mode, self.buffers = graph, fake_mode, buffers
        self.base: dict[fx.Node, fx.Node] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        self.version: dict[fx.Node, int] = {}
        self.made_at: dict[fx.Node, int] = {}
        self.origin: dict[fx.Node, fx.Node] = {}
        self.forwards: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                continue
            with self.graph.inserting_before(node):
                node.args = fx.map_arg(node.args, self.read)
                node.kwargs = fx.map_arg(node.kwargs, self.read)
            if _written(node) is not None:
                self.write(node)
            elif (source := _viewed(node)) is not None:
                self.note_view(node, source)

    def note_view(self, node: fx.Node, source: fx.Node) -> None:
        root = self.root(source)
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
        again = self.emit(node.target, (source, *node.args[1:]), dict(node.kwargs), node)
        self.base[again], self.made_at[again] = root, self.version[root]
        self.forwards[node] = again
        return again

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        with self.fake_mode:
            values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def write(self, node: fx.Node) -> None:
        written = _written(node)
        assert written is not None
        root = self.root(written)
        if root.op == "placeholder" and root.name in self.buffers:
            raise CaptureError(
                f"the forward updates buffer '{self.buffers[root.name]}' in {where(node)}; statistics that are updated "
                "by every batch (BatchNorm in training mode) are not supported: use GroupNorm or LayerNorm, or put "
                "the module into eval mode"
            )
        with self.graph.inserting_before(node):
            value = self.result(node)
            old = written.meta["val"]
            if value.meta["val"].dtype != old.dtype:
                value = self.emit(_aten.to.dtype, (value, old.dtype), {}, node)
            if value.meta["val"].shape != old.shape:
                value = self.emit(_aten.expand.default, (value, list(old.shape)), {}, node)
            self.write_back(written, value, root)
        node.replace_all_uses_with(written)
        self.graph.erase_node(node)

    def result(self, node: fx.Node) -> fx.Node:
        """What an in-place operation would have written, before it takes the shape and dtype of its target."""
        if node.target is _aten.copy_.default:
            # The functional `copy` has no derivative, `clone` has.
            return self.emit(_aten.clone.default, (node.args[1],), {}, node)
        return self.emit(_functional(node), node.args, dict(node.kwargs), node)

    def write_back(self, target: fx.Node, value: fx.Node, root: fx.Node) -> None:
        while target in self.base:
            source = target.args[0]
            assert isinstance(source, fx.Node)
            value = self.scatter(target, source, value)
            target = source
        self.current[root] = value
        self.origin[value] = root
        self.version[root] = self.version.get(root, 0) + 1

    def scatter(self, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
        """`source` with the part that `view` shows replaced by `value`."""
        inverse = _INVERSES.get(str(view.target))
        shape, dtype = source.meta["val"].shape, source.meta["val"].dtype
        if inverse is not None:
            target, args = inverse(view, source, value)
            return self.emit(target, args, {}, view)
        if view.meta["val"].shape == shape and view.meta["val"].dtype == dtype:
            return value
        raise CaptureError(f"the forward writes to the result of {view.target} in {where(view)}, which is a view")


def _functional(node: fx.Node) -> Any:
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else ""
    plain = f"__{name[3:]}" if name.startswith("__i") else name.rstrip("_")
    overload = getattr(node.target, "_overloadname", "default") or "default"
    functional = getattr(getattr(_aten, plain, None), overload, None)
    if functional is None or functional._schema.is_mutable:
        raise CaptureError(f"in-place operation {node.target} in {where(node)} has no functional form")
    return functional


_Inverse = Callable[[fx.Node, fx.Node, fx.Node], tuple[Any, tuple[Any, ...]]]


def _reshape_back(view: fx.Node, source: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return _aten.reshape.default, (value, list(source.meta["val"].shape))


_INVERSES: dict[str, _Inverse] = {
    "aten.slice.Tensor": lambda v, s, x: (_aten.slice_scatter.default, (s, x, *v.args[1:])),
    "aten.select.int": lambda v, s, x: (_aten.select_scatter.default, (s, x, *v.args[1:])),
    "aten.transpose.int": lambda v, s, x: (_aten.transpose.int, (x, *v.args[1:])),
    "aten.unsqueeze.default": lambda v, s, x: (_aten.squeeze.dim, (x, *v.args[1:])),
    "aten.squeeze.dim": lambda v, s, x: (_aten.unsqueeze.default, (x, *v.args[1:])),
    "aten.view.default": _reshape_back,
    "aten.reshape.default": _reshape_back,
    "aten.flatten.using_ints": _reshape_back,
}
