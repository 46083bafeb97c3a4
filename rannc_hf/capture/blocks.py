"""Cut the list of operations into blocks: contiguous runs between places where few bytes cross.

The export order is a topological order, so every contiguous run can be a block. Cuts are put where the model's own
repeated modules begin and end (`encoder.layer.3`), because structurally equal blocks share one function; where a model
has none, at the places where the fewest bytes cross.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from .errors import module_path
from .graph import Block, Graph
from .passes.per_sample import PerSample, spec
from .passes.schema import is_random

_PIECES = 16
"""Into how many blocks a part of a model without repeated modules is cut."""


def make_blocks(
    graph: fx.Graph,
    preamble: set[fx.Node],
    parameter_names: Mapping[str, str],
    outputs: set[fx.Node],
    sums: set[fx.Node],
    together: Sequence[set[fx.Node]] = (),
) -> tuple[Block, ...]:
    """Blocks over the operations of `graph` outside the preamble.

    `outputs` are nodes needed by the user; `sums` hold sums over the samples of a slice, which never leave a block;
    sets of operations in `together` are not cut.
    """
    body = [n for n in graph.nodes if n.op == "call_function" and n not in preamble]
    if not body:
        return ()
    cuts = _cuts(body, parameter_names, outputs, sums, together)
    position = {n: i for i, n in enumerate(body)}
    bounds = [0, *cuts, len(body)]
    blocks = []
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        nodes = body[start:stop]
        kept = [n for n in nodes if n in outputs or any(position.get(u, -1) >= stop for u in n.users)]
        blocks.append(_block(index, nodes, preamble, parameter_names, kept))
    return tuple(blocks)


def block_of(graph: Graph, index: int, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Block:
    """A block of any operations of a captured graph, given in graph order."""
    preamble = {n for n in graph.fx_graph.nodes if n.name in graph.preamble}
    return _block(index, list(nodes), preamble, graph.parameter_inputs, list(outputs))


def rebuilt(graph: Graph, block: Block) -> Block:
    """`block`, for a variant `graph` of its graph: operations of the same names, which may have other arguments."""
    nodes = {n.name: n for n in graph.fx_graph.nodes}
    made = block_of(graph, block.index, [nodes[n] for n in block.nodes], [nodes[n] for n in block.outputs])
    return replace(made, name=block.name)


# -- where to cut ----------------------------------------------------------------------------------------------------


def _cuts(
    body: list[fx.Node],
    parameter_names: Mapping[str, str],
    outputs: set[fx.Node],
    sums: set[fx.Node],
    together: Sequence[set[fx.Node]],
) -> list[int]:
    crossing = _crossing_bytes(body, outputs, sums)
    position = {n: i for i, n in enumerate(body)}
    for nodes in together:
        places = sorted(position[n] for n in nodes if n in position)
        for i in range(places[0] + 1, places[-1] + 1) if places else ():
            crossing[i] = None
    units = _units(body)
    cuts = [i for i in range(1, len(body)) if units[i] != units[i - 1] and crossing[i] is not None]
    bounds = [0, *cuts, len(body)]
    extra: list[int] = []
    for start, stop in itertools.pairwise(bounds):
        if stop - start > max(len(body) // 4, 24) and len(bounds) < _PIECES // 2:
            extra += _cheapest(crossing, start, stop, _PIECES)
    return _merge_small(sorted({*cuts, *extra}), body, parameter_names)


def _crossing_bytes(body: list[fx.Node], outputs: set[fx.Node], sums: set[fx.Node]) -> list[int | None]:
    """For each position, bytes a sample of the values that cross it; None where a cut is not possible.

    A cut is impossible where a tuple crosses, or a value with several rows a sample of which it is not known which rows
    belong to which sample (its shape does not tell), or a sum over samples (each replica holds only its part of it).
    """
    position = {n: i for i, n in enumerate(body)}
    size = [0] * (len(body) + 1)
    blocked = [0] * (len(body) + 1)
    for i, node in enumerate(body):
        last = max((position[u] for u in node.users if u in position), default=i)
        if node in outputs:
            last = max(last, i)
        own = spec(node)
        unordered = own is not None and own.batch_dim is not None and own.rows != 1 and not node.meta.get("ordered")
        cannot = own is None or unordered or node in sums
        size[i + 1] += own.bytes_at(1) if own is not None else 0
        blocked[i + 1] += cannot
        if last + 1 <= len(body):
            size[last + 1] -= own.bytes_at(1) if own is not None else 0
            blocked[last + 1] -= cannot
    crossing: list[int | None] = []
    total = forbidden = 0
    for i in range(len(body) + 1):
        total += size[i]
        forbidden += blocked[i]
        crossing.append(total if not forbidden else None)
    return crossing


def _units(body: list[fx.Node]) -> list[str]:
    """The repeated module each operation belongs to: its path up to the first index that tells modules apart.

    Each call of a module that is called again and again is one of its own.
    """
    for depth in range(1, 4):
        units = [_unit(n, depth) for n in body]
        named = [u for u in units if u]
        if not named:
            break
        most = max(named.count(u) for u in set(named))
        if most <= max(len(body) // 2, 24):
            return units
    return [module_path(n).split(".")[0] for n in body]


def _unit(node: fx.Node, indices: int) -> str:
    prefix = _prefix(module_path(node), indices)
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if prefix and (path == prefix or path.startswith(f"{prefix}.")):
            # Export marks the second call of a module as `name@1`.
            return prefix + "@".join(["", *key.split("@")[1:]])
    return prefix


def _prefix(path: str, indices: int) -> str:
    parts = path.split(".")
    seen = 0
    for i, part in enumerate(parts):
        if part.isdigit():
            seen += 1
            if seen == indices:
                return ".".join(parts[: i + 1])
    return ".".join(parts) if seen else ""


def _cheapest(crossing: Sequence[int | None], start: int, stop: int, pieces: int) -> list[int]:
    """About `pieces` evenly spread positions among those where the fewest bytes cross."""
    inner = [(c, i) for i, c in enumerate(crossing[start + 1 : stop], start + 1) if c is not None]
    if not inner:
        return []
    least = min(c for c, _ in inner)
    good = [i for c, i in inner if c <= least * 1.05]
    step = max(1, (stop - start) // pieces)
    chosen: list[int] = []
    for i in good:
        if i - (chosen[-1] if chosen else start) >= step and stop - i >= step:
            chosen.append(i)
    return chosen


def _merge_small(cuts: list[int], body: list[fx.Node], parameter_names: Mapping[str, str]) -> list[int]:
    """Drop cuts that would leave a block without parameters: it goes with the block before it."""
    kept: list[int] = []
    bounds = [0, *cuts, len(body)]
    for start, stop in itertools.pairwise(bounds[1:]):
        if any(a.name in parameter_names for n in body[start:stop] for a in n.all_input_nodes):
            kept.append(start)
    first = {a.name for n in body[: kept[0]] for a in n.all_input_nodes} & set(parameter_names) if kept else {""}
    return kept if first else kept[1:]


# -- blocks ----------------------------------------------------------------------------------------------------------


def _block(
    index: int,
    nodes: list[fx.Node],
    preamble: set[fx.Node],
    parameter_names: Mapping[str, str],
    outputs: list[fx.Node],
) -> Block:
    inside = set(nodes)
    parameters: dict[str, None] = {}
    inputs: dict[str, None] = {}
    shared: dict[str, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.name in parameter_names:
                parameters[parameter_names[source.name]] = None
            elif source in preamble:
                shared[source.name] = None
            elif source not in inside:
                inputs[source.name] = None
    return Block(
        index=index,
        name=_name(nodes, index),
        key=_key(nodes, preamble, parameter_names, outputs),
        nodes=tuple(n.name for n in nodes),
        parameters=tuple(parameters),
        inputs=tuple(inputs),
        preamble=tuple(shared),
        outputs=tuple(n.name for n in outputs),
        random=any(is_random(n) for n in nodes),
    )


def _name(nodes: list[fx.Node], index: int) -> str:
    """The module most of the block lies in, up to an index; else the modules it goes through."""
    units = [u for n in nodes if (u := _prefix(module_path(n), 1))]
    if len(units) * 2 > len(nodes):
        return max(sorted(set(units)), key=units.count)
    paths = dict.fromkeys(".".join(p.split(".")[:2]) for n in nodes if (p := module_path(n)))
    return " + ".join(list(paths)[:3]) or f"block {index}"


def _key(
    nodes: list[fx.Node], preamble: set[fx.Node], parameter_names: Mapping[str, str], outputs: list[fx.Node]
) -> str:
    """Hash of operations, wiring, shapes and dtypes; equal for blocks that compute the same function."""
    local: dict[fx.Node, str] = {}
    parameters: dict[str, int] = {}
    text: list[str] = []

    def refer(node: fx.Node) -> str:
        if node not in local:
            kind = "m" if node in preamble else "x"
            if node.name in parameter_names:
                kind = f"p{parameters.setdefault(parameter_names[node.name], len(parameters))}_"
            local[node] = f"{kind}{len(local)}"
            own = spec(node)
            text.append(f"{local[node]}:{_spec_text(own)}:{node.meta.get('needs_grad', False)}")
        return local[node]

    for node in nodes:
        arguments = _arguments_text((node.args, dict(node.kwargs)), refer)
        local[node] = f"%{len(local)}"
        text.append(f"{local[node]}={node.target}{arguments}:{_spec_text(spec(node))}")
    text.append("->" + ",".join(local[n] for n in outputs))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _spec_text(own: Any) -> str:
    if own is None:
        return "-"
    return f"{own.at(1)}{own.dtype}{own.batch_dim}*{own.rows}"


def _arguments_text(value: Any, refer: Any) -> str:
    if isinstance(value, fx.Node):
        return str(refer(value))
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_arguments_text(v, refer) for v in value) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_arguments_text(v, refer)}" for k, v in value.items()) + "}"
    return repr(value) if isinstance(value, (PerSample, float)) else str(value)
