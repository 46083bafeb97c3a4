"""Outputs that compare the samples of a batch with each other, such as CLIP's `logits_per_text`, are left out.

A slice of the batch cannot compute them. So are lists with an output for each sample or image. A script that computes
the loss from the other outputs, of each sample by itself, does not need them; whoever uses them is told.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.fx as fx

from .errors import CaptureError
from .graph import Graph


def pairs_of_samples(paths: Sequence[str], small: fx.Graph, large: fx.Graph) -> set[str]:
    """The outputs of samples x samples, of two exports with different numbers of samples whose outputs begin with
    `paths`. None where there are no others."""
    made = [next(n for n in graph.nodes if n.op == "output").args[0] for graph in (small, large)]
    found = {path for path, a, b in zip(paths, *made) if _compares(a, b)}
    return found if len(found) < len(paths) else set()


def one_a_sample(small: Collection[str], large: Collection[str]) -> set[str]:
    """The outputs, of those of two exports with different numbers of samples, that are in lists as long as there are
    samples.

    Raises:
        CaptureError: where that is all that is returned.
    """
    lists = {path.rpartition(".")[0] for path in {*small} ^ {*large}}
    if "" in lists:
        raise CaptureError("how many outputs forward returns depends on the number of samples")
    return {path for path in {*small, *large} if path.rpartition(".")[0] in lists}


def leave_out(paths: Sequence[str], graph: fx.Graph, left_out: Collection[str]) -> None:
    """Take outputs out of a graph whose outputs begin with `paths`."""
    output = next(n for n in graph.nodes if n.op == "output")
    values = output.args[0]
    output.args = ((*(v for p, v in zip(paths, values) if p not in left_out), *values[len(paths) :]),)


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


def _compares(a: object, b: object) -> bool:
    x, y = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (a, b))
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim():
        return False
    return sum(m != n for m, n in zip(x.shape, y.shape)) > 1
