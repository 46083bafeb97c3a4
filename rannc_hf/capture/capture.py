"""`capture`: model + example batch -> `Graph`."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from .ambient import told_grad_mode
from .answers import Answers, answer, guarded
from .asked import answers_about_tracing
from .blocks import make_blocks
from .errors import CaptureError
from .experts import graph_friendly_experts, told_of_router_losses
from .export import Export, export_step, without_defaults
from .folded import fold, rows_of, unfolded
from .graph import Block, Graph, ParameterSpec
from .opaque.operation import is_opaque, region_of
from .opaque.prepare import Regions, mark_kinds
from .opaque.search import with_regions
from .outputs import Step, computable, leaves_of
from .passes.batch_norm import expose_statistics
from .passes.cleanup import drop_assertions, drop_dead, drop_lifts, relax_views, spell_types
from .passes.counts import Counts, count_samples
from .passes.functionalize import functionalize
from .passes.independence import check_independent
from .passes.loss import globalize
from .passes.masked_writes import write_by_where
from .passes.out_variants import rewrite_outs
from .passes.per_sample import SAMPLES, merge, spec
from .passes.preamble import copy_outputs, mark_gradients, mark_preamble
from .passes.ragged import check_ragged
from .passes.regions import inline_regions
from .passes.rejoin import rejoin
from .passes.updates import check_samples, hoist, local_nodes, reduced, touching
from .state import preserved
from .watch import Losses, find_loss, is_loss, output_path

logger = logging.getLogger(__name__)


def capture(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    training: bool = True,
    loss: Losses = "fused",
    folded: Collection[str] | None = None,
) -> Graph:
    """Capture one step ``model(**batch)`` as a `Graph` that holds for any number of samples.

    No weight is allocated: the model may live on the meta device or hold fake tensors. Of the batch only shapes and
    dtypes matter, unless forward reads numbers out of it: then the graph holds for batches in which it would read the
    same (`Graph.guards`). A training graph computes the model's loss alone, or, where the loss is
    computed outside of it (`Graph.split`), all outputs, as an evaluation graph does.

    Args:
        model: any module. It is left as it was: parameters, buffers, modes and attributes.
        batch: arguments of `forward` by name; tensors have the samples in dimension 0, or as many rows for each sample,
            one sample after the other. Nones are left out. The graph takes the latter as (samples, rows, ...).
        dtype: dtype of the floating parameters in the graph; None for their own.
        training: the mode to capture the model in. In evaluation `torch.is_grad_enabled()` is what it is at this call.
        loss: of a training graph: "fused", the model's own; "split", computed outside; "auto", the model's own where it
            returns one.
        folded: the fields that are (samples, rows, ...) in `batch` already; None where it is as forward takes it.

    Raises:
        CaptureError: the message names the operation, the module it is in, and what to try.
        ValueError: for a batch without samples, or one whose fields disagree.
    """
    _refuse_scripts(model)
    inputs = _arguments(model, batch)
    if folded is None:
        _, rows = rows_of(inputs)
        inputs, folded = fold(inputs, rows), rows
    total, _ = rows_of(inputs)
    grad_mode = told_grad_mode(training or torch.is_grad_enabled())
    asked = answers_about_tracing(model)
    told = told_of_router_losses()
    with preserved(model), unfolded(model, folded), grad_mode, graph_friendly_experts(model), told, asked:
        # Modules that the user has set apart (a frozen part in eval mode) keep their own mode.
        if model.training != training:
            model.train(training)
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm) and module.training:
                raise CaptureError(_NO_SYNC)
            # What is recomputed is up to the plan.
            if getattr(module, "gradient_checkpointing", False):
                module.__dict__["gradient_checkpointing"] = False
        export = partial(export_step, model, inputs, total=total, dtype=dtype, loss=loss)
        attempt = partial(_captured, model, batch, training, loss, partial(answer, inputs, total), export, folded)
        graph = with_regions(model, inputs, total, dtype, attempt)
    return guarded(graph, inputs, total, folded)


def _refuse_scripts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            name = f"module '{path}'" if path else "the model"
            raise CaptureError(
                f"{name} ({type(module).__name__}) is TorchScript, which hides its operations and parameters: "
                "pass the Python module that it was made from"
            )


def _captured(
    model: nn.Module,
    batch: Mapping[str, Any],
    training: bool,
    loss: Losses,
    answered: Callable[[Callable[..., Export]], Answers | None],
    export: Callable[..., Export],
    folded: Collection[str],
    regions: Regions,
) -> Graph:
    """The graph of a step, with what the batch says only where it cannot be captured without."""
    export = partial(export, regions=regions)

    def attempt(answers: Answers | None) -> Graph:
        known = {n: answers.known(n) if answers is not None else None for n in SAMPLES}
        small, large = (_step(export(samples=n, known=known[n]), model, batch, training, loss) for n in SAMPLES)
        small, large = computable(small, large, known[SAMPLES[0]])
        merge(small.graph, large.graph, (small.export.constants, large.export.constants))
        first = known[SAMPLES[0]]
        return _finish(small, model, training, regions, folded, first.scatters if first is not None else 0)

    try:
        return attempt(None)
    except CaptureError as error:
        try:
            answers = answered(export)
            if answers is None:
                raise error
            graph = replace(attempt(answers), guards=answers.guards)
        except CaptureError as other:
            # Where values do not help, it may help that the module runs as it is.
            other.module = error.module if other.module is None else other.module
            raise
        logger.info("rannc: captured with values of the batch, because without them %s", error)
        return graph


def _step(export: Export, model: nn.Module, batch: Mapping[str, Any], training: bool, losses: Losses) -> Step:
    structure = pytree.tree_unflatten(list(export.output_names), export.output_spec)
    leaves, _ = pytree.tree_flatten_with_path(structure)
    paths = {output_path(keys): name for keys, name in leaves if isinstance(name, str)}
    loss = find_loss(structure)
    graph = export.module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    values = dict(zip(export.output_names, output.args[0][-len(export.output_names) :]))
    value = values[loss].meta["val"] if isinstance(loss, str) else None
    loss_path = next((p for p, name in paths.items() if name == loss), None)
    split = training and (losses == "split" or (losses == "auto" and not is_loss(value)))
    if not is_loss(value):
        if training and not split:
            raise CaptureError(_refuse_loss(model, batch, value))
        loss_path = None
    if training and not split:
        assert loss_path is not None
        paths = {"loss": paths[loss_path]}
        loss_path = "loss"
    output.args = (tuple(values[name] for name in paths.values()),)
    inline_regions(export.module)
    drop_assertions(graph)
    expose_statistics(graph, export.fake_mode)
    rewrite_outs(graph, export.fake_mode)
    drop_dead(graph, keep=[n.name for n in graph.nodes if n.is_impure()])
    rejoin(graph, export.fake_mode)
    updates = functionalize(graph, export.fake_mode, export.buffer_inputs, export.parameter_inputs, training=training)
    output.args = ((*output.args[0], *updates.values()),)
    drop_lifts(graph)
    write_by_where(graph, export.fake_mode)
    relax_views(graph)
    spell_types(graph)
    drop_dead(graph)
    hoist(graph, updates.values())
    constants = {i: (output_path(k), export.output_constants[i]) for i, (k, name) in enumerate(leaves) if name is None}
    told = {} if training and not split else constants
    return Step(export, paths, leaves_of(paths, export), loss_path, split, tuple(updates), told)


def _finish(
    step: Step, model: nn.Module, training: bool, regions: Regions, folded: Collection[str], scatters: int
) -> Graph:
    graph, export = step.graph, step.export
    specs, names = _parameters(model, export)
    _redirect_tied(graph, names)
    drop_dead(graph)
    mark_kinds(graph, regions)
    preamble = mark_preamble(graph, {*names, *step.updates})
    preamble.update(n for n in graph.nodes if n.name in step.updates)
    output = next(n for n in graph.nodes if n.op == "output")
    by_path = dict(zip(step.paths, output.args[0]))
    local = local_nodes(graph, by_path.values())
    check_ragged(graph, [n for n in graph.nodes if export.batch_inputs.get(n.name) in folded], local)
    check_independent(graph, preamble, local, training, scatters)
    counts = Counts(graph, preamble, export.fake_mode, local)
    count_samples(counts)
    sums = globalize(graph, counts, by_path[step.loss] if step.loss is not None else None)
    check_samples(local, sums, {p: export.buffer_inputs[p] for p in step.updates})
    copy_outputs(graph, preamble)
    _mark_needs_grad(graph, {p for p, n in names.items() if specs[n].trainable}, local)
    # Outputs may have been replaced by their global form.
    by_path = dict(zip(step.paths, output.args[0]))
    updates = dict(zip(step.updates, output.args[0][len(step.paths) :]))
    drop_dead(graph, keep={c.node for c in counts.made if c.node is not None})
    live = {n.name for n in graph.nodes}
    outputs = {path: node.name for path, node in by_path.items()}
    wanted = {*by_path.values(), *updates.values()}
    blocks = make_blocks(graph, preamble, names, wanted, sums | reduced(local), touching(graph, updates))
    result = Graph(
        fx_graph=graph,
        training=training,
        parameters=specs,
        parameter_inputs={p: n for p, n in names.items() if p in live},
        buffer_inputs={p: n for p, n in export.buffer_inputs.items() if p in live or p in updates},
        constants={p: t for p, t in export.constants.items() if p in live},
        batch_inputs={p: f for p, f in export.batch_inputs.items() if p in live},
        counts=tuple(c for c in counts.made if c.placeholder in live),
        values={n.name: own for n in graph.nodes if (own := spec(n)) is not None},
        preamble=frozenset(n.name for n in preamble if n.name in live),
        blocks=blocks,
        loss=outputs[step.loss] if step.loss is not None else None,
        outputs=outputs,
        output_spec=export.output_spec,
        output_leaves=step.leaves,
        output_constants={index: value for index, (_, value) in step.constants.items()},
        updates={p: node.name for p, node in updates.items()},
        sums=frozenset(n.name for n in sums if n.name in live),
        structural_hash=_hash(blocks, specs),
        split=step.split,
        opaque={key: regions.by_key[key] for n in graph.nodes if is_opaque(n) and (key := region_of(n))},
    )
    if training:
        _check_gradients(result, export.gradients)
    return result


_NO_SYNC = (
    "SyncBatchNorm takes its statistics over the samples of all processes, and rannc takes them over a slice of the "
    "batch: use BatchNorm1d, 2d or 3d (with few microbatches, if slices are small), or put the module into eval mode"
)


# -- outputs ---------------------------------------------------------------------------------------------------------


def _refuse_loss(model: nn.Module, batch: Mapping[str, Any], value: torch.Tensor | None) -> str:
    text = f"{type(model).__name__} returns no loss for a batch with the fields {sorted(batch)}"
    if value is None:
        return (
            f"{text}: pass labels, or return the loss as `loss`, as the first output, or as the only output; or leave "
            "the option `loss` at auto, for a loss that the script computes from the outputs"
        )
    return (
        f"{text}: its `loss`, or first or only output, is not a floating scalar, but {value.dtype} of shape "
        f"{tuple(value.shape)} for {SAMPLES[0]} samples; pass labels if it takes any, and return the sum or mean of "
        "the loss"
    )


# -- parameters ------------------------------------------------------------------------------------------------------


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


def _redirect_tied(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Uses of a tied weight's other names become uses of its first placeholder."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in names:
            kept = first.setdefault(names[node.name], node)
            if kept is not node:
                node.replace_all_uses_with(kept)


def _mark_needs_grad(graph: fx.Graph, trainable: set[str], local: set[fx.Node]) -> None:
    # No gradient comes back from a buffer.
    carriers = mark_gradients(graph, trainable) - local
    for node in graph.nodes:
        own = spec(node)
        node.meta["needs_grad"] = node in carriers
        if own is not None:
            node.meta["spec"] = replace(own, needs_grad=node in carriers)


def _check_gradients(graph: Graph, expected: frozenset[str]) -> None:
    """Compare where the graph leads the loss's gradient with where autograd did."""
    what = "no output" if graph.split else "the loss"
    if not any(graph.values[name].needs_grad for name in graph.differentiated):
        does = "depends on a" if graph.split else "depends on no"
        raise CaptureError(f"{what} {does} trainable parameter: check requires_grad, and what forward uses")
    found = graph.gradient_parameters()
    wrong = sorted(expected ^ found)
    if wrong:
        raise CaptureError(
            f"the captured step would {'not ' if wrong[0] in expected else ''}give a gradient to '{wrong[0]}' "
            f"({len(wrong)} parameters differ), unlike the model itself: an operation between it and "
            f"{'an output' if graph.split else 'the loss'} is "
            "captured without its backward"
        )


def _hash(blocks: tuple[Block, ...], specs: Mapping[str, ParameterSpec]) -> str:
    """What the meaning of a plan depends on: parameters, and which block uses which. Lengths may differ."""
    text = [f"{block.name}:{','.join(block.parameters)}" for block in blocks]
    text += [f"{p.name}{p.shape}{p.trainable}{p.aliases}" for p in specs.values()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


# -- arguments -------------------------------------------------------------------------------------------------------


def _arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without Nones, and without the key-value cache, which is for generation: it could not be split."""
    result = without_defaults(model, batch)
    for name, value in result.items():
        if not isinstance(value, torch.Tensor) and any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value)):
            raise CaptureError(
                f"field '{name}' of the batch is a {type(value).__name__} of tensors; fields must be tensors with the "
                "samples in dimension 0, or plain values. If it is for the loss alone (the boxes of each image), leave "
                "it out of the batch, and compute the loss from the outputs in the script (in a Trainer's compute_loss)"
            )
    # Parts of a model have configurations of their own: T5's decoder keeps a cache although Trainer turned it off.
    cached = any(getattr(getattr(module, "config", None), "use_cache", False) for module in model.modules())
    if "use_cache" in result or not cached:
        return result
    accepted = inspect.signature(model.forward).parameters
    takes = "use_cache" in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    return {**result, "use_cache": False} if takes else result
