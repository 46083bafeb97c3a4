"""Drop what only export needs: metadata assertions, fresh copies of constants, results that nothing uses."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.fx as fx

_aten = torch.ops.aten
_ASSERTIONS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")


def drop_assertions(graph: fx.Graph) -> None:
    """Erase assertion nodes. They check facts that hold for the captured shapes and dtypes by construction."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and any(a in str(node.target) for a in _ASSERTIONS) and not node.users:
            graph.erase_node(node)


def drop_lifts(graph: fx.Graph) -> None:
    """`lift_fresh_copy` of a constant is the constant: mutation is handled before, by `functionalize`."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _aten.lift_fresh_copy.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def spell_types(graph: fx.Graph) -> None:
    """Make every `type_as` a `to` with the dtype itself: it does not depend on the values, or samples, of the other."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _aten.type_as.default:
            node.target = _aten.to.dtype
            node.args = (node.args[0], node.meta["val"].dtype)


def relax_views(graph: fx.Graph) -> None:
    """Make every `view` a `reshape`, which copies where it must; mutation is handled before, by `functionalize`.

    A tensor may lie in memory in another way than when traced: what comes from another stage is contiguous, and how
    attention's result lies depends on the kernel that runs it.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _aten.view.default:
            node.target = _aten.reshape.default


def drop_dead(graph: fx.Graph, keep: Collection[str] = ()) -> None:
    """Erase nodes without users, inputs too; `keep` holds names of nodes to leave."""
    for node in reversed(list(graph.nodes)):
        if node.op != "output" and not node.users and node.name not in keep:
            graph.erase_node(node)
