"""Buffers that a step writes to: which operations compute their new values, and where these stand.

A new value is computed from the samples at hand: those of one replica's slice of a microbatch, as under
DistributedDataParallel from those of one rank. So what serves a buffer alone may work across samples, which what leads
to the loss may not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch.fx as fx

from ..errors import CaptureError, where
from .batch_norm import results_of
from .per_sample import spec


def hoist(graph: fx.Graph, updates: Collection[fx.Node]) -> None:
    """Move what serves updates alone to right after what it is computed from.

    Export writes ``self.buffer = ...`` at the end of the graph, from where values would cross all stages.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    local = local_nodes(graph, [n for n in output.all_input_nodes if n not in updates])
    place: dict[fx.Node, int] = {}
    """The place of a node among those that stay where they are: that of the last one it is computed from."""
    tail: dict[int, fx.Node] = {}
    for i, node in enumerate(list(graph.nodes)):
        sources = [n for n in node.all_input_nodes if n.op == "call_function"]
        if node not in local or not sources:
            place[node], tail[i] = i, node
            continue
        place[node] = max(place[n] for n in sources)
        last = tail[place[node]]
        last.append(node)
        tail[place[node]] = node
        if not node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = last.meta.get("nn_module_stack", {})


def local_nodes(graph: fx.Graph, results: Iterable[fx.Node], shared: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The operations that no result and no node in `shared` depends on: they compute new values of buffers."""
    needed: set[fx.Node] = set()
    stack = [*results, *shared]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(results_of(node))
    return {n for n in graph.nodes if n.op == "call_function" and n not in needed}


def touching(graph: fx.Graph, updates: Mapping[str, fx.Node]) -> list[set[fx.Node]]:
    """For each buffer that is written, by placeholder, the operations that read and write it: one stage holds it."""
    return [{*node.users, updates[node.name]} for node in graph.nodes if node.name in updates]


def check_samples(local: Collection[fx.Node], sums: Collection[fx.Node], updates: Mapping[str, str]) -> None:
    """Refuse updates computed from what became a sum over the global batch.

    Raises:
        CaptureError: naming a buffer, and the operation.
    """
    for node in local:
        if any(n in sums for n in node.all_input_nodes):
            raise CaptureError(
                f"buffer '{next(iter(updates.values()))}' or another one is updated from the loss, or from a sum or "
                f"mean over samples that the loss depends on, in {where(node)}: these are computed for the whole batch "
                "in parts; compute what the buffer needs separately from the activations"
            )


def reduced(local: Collection[fx.Node]) -> set[fx.Node]:
    """Those of `local` whose values are one slice's own: they cannot be sent to replicas of other stages."""
    return {n for n in local if (own := spec(n)) is None or own.batch_dim is None}
