"""What a step returns, and what of it is left out because a slice of the batch cannot compute it.

Those are outputs that compare the samples of a batch with each other, such as CLIP's `logits_per_text`, and lists with
an output for each sample or image. A script that computes the loss from the other outputs, of each sample by itself,
does not need them; whoever uses them is told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from .errors import CaptureError
from .export import Export
from .graph import Graph
from .opaque.tuples import SampleTuple
from .passes.cleanup import drop_dead
from .values import Known


@dataclass(frozen=True)
class Step:
    """An exported step, cleaned down to what its outputs need."""

    export: Export
    paths: Mapping[str, str]
    """Path of each output to the node that the model returned."""
    leaves: tuple[str | None, ...]
    """For each leaf of what `forward` returns, the path of the output that holds it, or would, if it were computed."""
    loss: str | None
    """The path of the loss."""
    split: bool
    """Whether a training step's loss is computed outside of it."""
    updates: tuple[str, ...]
    """Placeholders of the buffers that the step writes to, whose new values follow the outputs."""
    constants: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    """Path and value of the leaves that are not tensors, by their number; none where only the loss is computed."""

    @property
    def graph(self) -> fx.Graph:
        return self.export.module.graph


def leaves_of(paths: Mapping[str, str], export: Export) -> tuple[str | None, ...]:
    """For each leaf of what `forward` returns, the path of the output that holds it; None for what is not a tensor."""
    first: dict[str | None, str] = {}
    for path, name in paths.items():
        first.setdefault(name, path)
    return tuple(first.get(name) for name in export.output_names)


def computable(small: Step, large: Step, known: Known | None) -> tuple[Step, Step]:
    """Two exports of a step, with different numbers of samples, without the outputs that a slice cannot compute.

    Raises:
        CaptureError: where no others are left.
    """
    left_out = _one_a_sample(small.paths, large.paths)
    if not left_out:
        left_out = _pairs_of_samples(list(small.paths), small.graph, large.graph)
    uneven = set() if known is None else known.uneven & small.paths.keys()
    if uneven and left_out | uneven >= small.paths.keys():
        raise CaptureError(f"the number of rows of the outputs {sorted(uneven)} is another one for each sample")
    left_out |= uneven
    if left_out:
        small, large = _without(small, left_out), _without(large, left_out)
    return _told_constants(small, dict(large.constants.values())), large


def _one_a_sample(small: Collection[str], large: Collection[str]) -> set[str]:
    """Outputs that are in lists as long as there are samples."""
    lists = {path.rpartition(".")[0] for path in {*small} ^ {*large}}
    if "" in lists:
        raise CaptureError("how many outputs forward returns depends on the number of samples")
    return {path for path in {*small, *large} if path.rpartition(".")[0] in lists}


def _pairs_of_samples(paths: Sequence[str], small: fx.Graph, large: fx.Graph) -> set[str]:
    """Outputs of samples x samples, of graphs whose outputs begin with `paths`. None where there are no others."""
    made = [next(n for n in graph.nodes if n.op == "output").args[0] for graph in (small, large)]
    found = {path for path, a, b in zip(paths, *made) if _compares(a, b)}
    return found if len(found) < len(paths) else set()


def _compares(a: object, b: object) -> bool:
    x, y = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (a, b))
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim():
        return False
    # A size that values decide is a symbol, and none of samples.
    sizes = [(m, n) for m, n in zip(x.shape, y.shape) if isinstance(m, int) and isinstance(n, int)]
    return sum(m != n for m, n in sizes) > 1


def _without(step: Step, left_out: Collection[str]) -> Step:
    paths, output = list(step.paths), next(n for n in step.graph.nodes if n.op == "output")
    values = output.args[0]
    output.args = ((*(v for p, v in zip(paths, values) if p not in left_out), *values[len(paths) :]),)
    drop_dead(step.graph)
    reached = step.export.gradients_by_leaf
    assert len(reached) in (0, len(step.leaves)), "in evaluation nothing is differentiated"
    kept = [own for path, own in zip(step.leaves, reached) if path not in left_out]
    export = replace(step.export, gradients=frozenset().union(*kept))
    return replace(step, export=export, paths={p: n for p, n in step.paths.items() if p not in left_out})


def _told_constants(small: Step, large: Mapping[str, Any]) -> Step:
    """The step with the paths of leaves that are not tensors, where they depend on the number of samples."""
    leaves, kept = list(small.leaves), {}
    for index, (path, value) in small.constants.items():
        if isinstance(value, SampleTuple) or path not in large or value != large[path]:
            leaves[index] = path
        else:
            kept[index] = (path, value)
    return replace(small, leaves=tuple(leaves), constants=kept)


def told_left_out(graph: Graph) -> list[str]:
    """What the user is told of outputs that are left out."""
    if not graph.left_out:
        return []
    text = (
        "outputs that compare all samples of a batch with each other, have another number of rows for each, or come "
        f"as a list of all samples, are not returned: {', '.join(graph.left_out)}. Compute them from other outputs"
    )
    trained = graph.gradient_parameters() if graph.training else frozenset()
    lost = sorted(n for n, p in graph.parameters.items() if p.trainable and n not in trained) if graph.training else []
    return [f"{text}. No gradient reaches {', '.join(lost)}, which no other output depends on" if lost else text]
