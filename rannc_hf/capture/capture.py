"""`capture`: model + example batch -> `Graph`."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from .blocks import make_blocks
from .errors import CaptureError
from .export import Export, batch_size, export_step
from .graph import Block, Graph, ParameterSpec
from .passes.cleanup import drop_assertions, drop_lifts
from .passes.functionalize import functionalize
from .passes.loss import check_independent, globalize
from .passes.per_sample import merge, spec
from .passes.preamble import mark_gradients, mark_preamble
from .passes.regions import inline_regions

_SAMPLES = (2, 3)
"""The two sample counts whose exports are compared. Neither is 1, which models may treat as a special case."""


def capture(
    model: nn.Module, batch: Mapping[str, Any], *, dtype: torch.dtype | None = None, training: bool = True
) -> Graph:
    """Capture one step ``model(**batch)`` as a `Graph` that holds for any number of samples.

    Nothing is computed and no weight is allocated: the model may live on the meta device or hold fake tensors, and of
    the batch only shapes and dtypes matter. A training graph computes the loss alone; an evaluation graph all outputs.

    Args:
        model: any module; its parameters are not touched.
        batch: arguments of `forward` by name; tensors have the samples in dimension 0.
        dtype: dtype of the floating parameters in the graph; None for their own.
        training: the mode to capture the model in.

    Raises:
        CaptureError: the message names the operation, the module it is in, and what to try.
    """
    batch = _without_cache(model, dict(batch))
    total = batch_size(batch)
    with _mode(model, training):
        small, large = (_clean(export_step(model, batch, n, total, dtype)) for n in _SAMPLES)
    graph = small.module.graph
    merge(graph, large.module.graph, _SAMPLES)
    paths, loss, nodes = _outputs(small, model)
    if training:
        if loss is None:
            raise CaptureError(
                f"{type(model).__name__} returns no loss for a batch with the fields {sorted(batch)}: pass labels, or "
                "return the loss as `loss`, as the first output, or as the only output"
            )
        paths, nodes = {"loss": loss}, {"loss": nodes[loss]}
    return _finish(small, model, training, paths, loss)


def _finish(export: Export, model: nn.Module, training: bool, paths: dict[str, str], loss: str | None) -> Graph:
    graph = export.module.graph
    specs, names = _parameters(model, export)
    _redirect_tied(graph, names)
    _set_outputs(graph, paths)
    _drop_dead(graph)
    preamble = mark_preamble(graph, set(names))
    check_independent(graph)
    counts = globalize(graph, preamble)
    _mark_needs_grad(graph, {p for p, n in names.items() if specs[n].trainable})
    # The loss may have been replaced by its global form.
    output = next(n for n in graph.nodes if n.op == "output")
    by_path = dict(zip(paths, output.args[0]))
    outputs = {path: node.name for path, node in by_path.items()}
    loss_name = next((outputs[path] for path, name in paths.items() if name == loss), None) if loss else None
    count_nodes = {c.node for c in counts if c.node}
    _drop_dead(graph, keep=count_nodes)
    blocks = make_blocks(graph, preamble, names, set(by_path.values()))
    live = {n.name for n in graph.nodes}
    result = Graph(
        fx_graph=graph,
        training=training,
        parameters=specs,
        parameter_inputs={p: n for p, n in names.items() if p in live},
        buffer_inputs={p: n for p, n in export.buffer_inputs.items() if p in live},
        constants={p: t for p, t in export.constants.items() if p in live},
        batch_inputs={p: f for p, f in export.batch_inputs.items() if p in live},
        counts=tuple(c for c in counts if c.placeholder in live),
        values={n.name: own for n in graph.nodes if (own := spec(n)) is not None},
        preamble=frozenset(n.name for n in preamble if n.name in live),
        blocks=blocks,
        loss=loss_name,
        outputs=outputs,
        output_spec=export.output_spec,
        output_leaves=tuple(next((k for k, v in paths.items() if v == o), None) for o in export.output_names),
        structural_hash=_hash(blocks, specs),
    )
    if training:
        _check_loss(result)
    return result


def _clean(export: Export) -> Export:
    inline_regions(export.module)
    graph = export.module.graph
    drop_assertions(graph)
    functionalize(graph, export.fake_mode, export.buffer_inputs)
    drop_lifts(graph)
    return export


def _outputs(export: Export, model: nn.Module) -> tuple[dict[str, str], str | None, dict[str, fx.Node]]:
    """Outputs by path, the name of the loss among them, and nodes by name."""
    nodes = {n.name: n for n in export.module.graph.nodes}
    output = next(n for n in export.module.graph.nodes if n.op == "output")
    # Functionalisation may have replaced the nodes that the signature names: read them off the graph.
    flat = output.args[0]
    assert isinstance(flat, (tuple, list))
    names = tuple(n.name if isinstance(n, fx.Node) and spec(n) is not None else None for n in flat)
    object.__setattr__(export, "output_names", names[-len(export.output_names) :])
    structure = pytree.tree_unflatten(list(export.output_names), export.output_spec)
    with_paths, _ = pytree.tree_flatten_with_path(structure)
    paths = {_path(p): v for p, v in with_paths if isinstance(v, str)}
    return paths, _loss(structure, nodes), nodes


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys) or "0"


def _loss(structure: Any, nodes: dict[str, fx.Node]) -> str | None:
    """The loss among the outputs: `loss`, the only output, or the first of a tuple, if it is a scalar."""
    if isinstance(structure, Mapping):
        candidate = structure.get("loss")
    elif isinstance(structure, (tuple, list)):
        candidate = getattr(structure, "loss", structure[0] if structure else None)
    else:
        candidate = getattr(structure, "loss", structure)
    if not isinstance(candidate, str):
        return None
    own = spec(nodes[candidate])
    return candidate if own is not None and own.shape == () and own.dtype.is_floating_point else None


def _parameters(model: nn.Module, export: Export) -> tuple[dict[str, ParameterSpec], dict[str, str]]:
    """Specs by canonical name (tied names as aliases), and placeholders to canonical names."""
    canonical: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    of_name: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(parameter), name)
        of_name[name] = first
        aliases.setdefault(first, [])
        if name != first:
            aliases[first].append(name)
    specs = {
        name: ParameterSpec(name, tuple(p.shape), p.dtype, p.requires_grad, tuple(aliases[name]))
        for name, p in model.named_parameters()
    }
    return specs, {p: of_name[n] for p, n in export.parameter_inputs.items()}


def _redirect_tied(graph: fx.Graph, names: dict[str, str]) -> None:
    """Uses of a tied weight's other names become uses of its first placeholder."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in names:
            kept = first.setdefault(names[node.name], node)
            if kept is not node:
                node.replace_all_uses_with(kept)


def _set_outputs(graph: fx.Graph, paths: dict[str, str]) -> None:
    nodes = {n.name: n for n in graph.nodes}
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (tuple(nodes[name] for name in paths.values()),)


def _drop_dead(graph: fx.Graph, keep: Collection[str] = ()) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op != "output" and not node.users and node.name not in keep:
            graph.erase_node(node)


def _mark_needs_grad(graph: fx.Graph, trainable: set[str]) -> None:
    carriers = mark_gradients(graph, trainable)
    for node in graph.nodes:
        own = spec(node)
        node.meta["needs_grad"] = node in carriers
        if own is not None:
            node.meta["spec"] = replace(own, needs_grad=node in carriers)


def _check_loss(graph: Graph) -> None:
    assert graph.loss is not None
    if not graph.values[graph.loss].needs_grad:
        raise CaptureError("the loss depends on no trainable parameter: check requires_grad and that forward uses them")


def _hash(blocks: tuple[Block, ...], specs: Mapping[str, ParameterSpec]) -> str:
    """What the meaning of a plan depends on: parameters, and which block uses which. Lengths may differ."""
    text = [f"{block.name}:{','.join(block.parameters)}" for block in blocks]
    text += [f"{p.name}{p.shape}{p.trainable}{p.aliases}" for p in specs.values()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _without_cache(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Key-value caches are for generation: a training or evaluation step neither needs nor can split them."""
    if "use_cache" in batch or not getattr(getattr(model, "config", None), "use_cache", False):
        return batch
    accepted = inspect.signature(model.forward).parameters
    takes = "use_cache" in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    return {**batch, "use_cache": False} if takes else batch


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model into a mode for a while. Modules that the user has set apart keep their own mode in training."""
    if model.training == training:
        yield
        return
    saved = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in saved.items():
            module.training = mode
