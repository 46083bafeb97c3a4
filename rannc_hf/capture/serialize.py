"""A `Graph` as a file: safetensors with the constants, and the rest as JSON in its header.

Reading one runs no code from the file: operations are looked up by name among PyTorch's own, and all else is data. What
planning and placing use is kept; traces into the model's source are not, nor is the structure of what `forward`
returns, whose classes are the model's.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from .disk import write
from .graph import Block, GlobalCount, Graph, ParameterSpec, ValueSpec
from .passes.per_sample import PerSample

_FORMAT = "rannc_hf graph 2"
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
"""Kinds of arguments that are attributes of `torch`."""
_OPERATORS = {f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul")}


def save_graph(graph: Graph, path: Path, key: Mapping[str, Any]) -> bool:
    """Write `graph`, with the `key` it is found again by. False, with a warning, where the file cannot be written.

    Raises ValueError for a graph with something in it that has no place in a file.
    """
    from safetensors import torch as files

    if graph.opaque:
        what = next(iter(graph.opaque.values())).name
        raise ValueError(f"{what} runs as it is written, and code has no place in a file")
    constants = {name: t.detach().cpu().contiguous().clone() for name, t in graph.constants.items()}
    header = {"format": _FORMAT, "key": json.dumps(key), "graph": json.dumps(_pack(graph))}
    content = files.save(constants, header)
    return write(path, lambda partial: partial.write_bytes(content))


def load_graph(path: Path, key: Mapping[str, Any]) -> Graph:
    """The graph that was saved with `key`.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is damaged, or was saved with another key; the field that differs is named.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            constants = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != _FORMAT:
            raise ValueError(f"it is not a {_FORMAT!r} file")
        found = json.loads(header["key"])
        for field in sorted({*key, *found}):
            if found.get(field) != key.get(field):
                raise ValueError(f"made for another {field}: found {found.get(field)!r}, expected {key.get(field)!r}")
        return _unpack(json.loads(header["graph"]), constants)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


# -- the graph -------------------------------------------------------------------------------------------------------


def _pack(graph: Graph) -> dict[str, Any]:
    stacks: dict[str, int] = {}
    return {
        "nodes": [_pack_node(n, stacks) for n in graph.fx_graph.nodes],
        "stacks": [json.loads(s) for s in stacks],
        "training": graph.training,
        "parameters": [asdict(p) | {"dtype": _name(p.dtype)} for p in graph.parameters.values()],
        "values": {name: _pack_spec(spec) for name, spec in graph.values.items()},
        "blocks": [asdict(b) for b in graph.blocks],
        "counts": [asdict(c) for c in graph.counts],
        **{field: dict(getattr(graph, field)) for field in _MAPS},
        "loss": graph.loss,
        "preamble": sorted(graph.preamble),
        "sums": sorted(graph.sums),
        "structural_hash": graph.structural_hash,
        "split": graph.split,
    }


_MAPS = ("parameter_inputs", "buffer_inputs", "batch_inputs", "outputs", "updates")


def _unpack(data: dict[str, Any], constants: Mapping[str, torch.Tensor]) -> Graph:
    values = {name: _unpack_spec(spec) for name, spec in data["values"].items()}
    parameters = [ParameterSpec(**_tuples(p) | {"dtype": _torch("dtype", p["dtype"])}) for p in data["parameters"]]
    return Graph(
        fx_graph=_unpack_nodes(data["nodes"], data["stacks"], values),
        training=data["training"],
        parameters={p.name: p for p in parameters},
        constants=constants,
        counts=tuple(GlobalCount(**c) for c in data["counts"]),
        values=values,
        preamble=frozenset(data["preamble"]),
        blocks=tuple(Block(**_tuples(b)) for b in data["blocks"]),
        loss=data["loss"],
        sums=frozenset(data["sums"]),
        structural_hash=data["structural_hash"],
        split=data["split"],
        **{field: data[field] for field in _MAPS},
    )


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def _pack_spec(spec: ValueSpec) -> list[Any]:
    return [list(spec.shape), _name(spec.dtype), spec.batch_dim, spec.rows, spec.needs_grad, spec.runs]


def _unpack_spec(data: list[Any]) -> ValueSpec:
    shape, dtype, batch_dim, rows, needs_grad, runs = data
    return ValueSpec(tuple(shape), _torch("dtype", dtype), batch_dim, rows, needs_grad, runs)


# -- nodes -----------------------------------------------------------------------------------------------------------


def _pack_node(node: fx.Node, stacks: dict[str, int]) -> list[Any]:
    modules = [[key, path, str(kind)] for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items()]
    stack = stacks.setdefault(json.dumps(modules), len(stacks))
    target = _target_name(node.target) if node.op == "call_function" else str(node.target)
    needs_grad = node.meta.get("needs_grad", False)
    return [node.op, node.name, target, _pack_argument(node.args), _pack_argument(dict(node.kwargs)), stack, needs_grad]


def _unpack_nodes(rows: list[list[Any]], stacks: list[Any], values: Mapping[str, ValueSpec]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    targets: dict[str, Any] = {}
    modules = [{key: (path, kind) for key, path, kind in stack} for stack in stacks]
    for op, name, target, args, kwargs, stack, needs_grad in rows:
        if op not in ("placeholder", "call_function", "output"):
            raise ValueError(f"node {name} has the unknown kind {op!r}")
        if op == "call_function" and target not in targets:
            targets[target] = _target(target)
        what = targets[target] if op == "call_function" else target
        node = graph.create_node(op, what, _argument(args, nodes), _argument(kwargs, nodes), name)
        if node.name != name:
            raise ValueError(f"there are two nodes called {name}")
        nodes[name] = node
        node.meta = {"nn_module_stack": modules[stack], "needs_grad": needs_grad, "spec": values.get(name)}
    return graph


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, function in _OPERATORS.items():
        if target is function:
            return name
    raise ValueError(f"{target} is no operation of PyTorch")


def _target(name: str) -> Any:
    if name in _OPERATORS:
        return _OPERATORS[name]
    namespace, operation, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{name} is no operation of PyTorch")
    return found


def _pack_argument(value: Any) -> Any:
    """Plain values and tuples are themselves; everything else is an object with one key that says what it is."""
    if isinstance(value, PerSample):
        return {"per_sample": int(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return [_pack_argument(v) for v in value]
    if isinstance(value, list):
        return {"list": [_pack_argument(v) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _pack_argument(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, of in _NAMED.items():
        if isinstance(value, of):
            return {kind: _name(value)}
    raise ValueError(f"an argument of type {type(value).__name__} has no place in a file")


def _argument(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return tuple(_argument(v, nodes) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "per_sample":
        return PerSample(content)
    if kind == "list":
        return [_argument(v, nodes) for v in content]
    if kind == "dict":
        return {k: _argument(v, nodes) for k, v in content.items()}
    return torch.device(content) if kind == "device" else _torch(kind, content)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _torch(kind: str, name: str) -> Any:
    found = getattr(torch, name, None)
    if kind not in _NAMED or not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{name} is no {kind} of PyTorch")
    return found
