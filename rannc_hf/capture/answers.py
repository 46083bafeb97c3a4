"""Find what a forward reads out of the batch, by exporting it with the data of all samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .errors import CaptureError
from .export import Export
from .graph import Graph
from .guards import Guards, Read
from .values import Known


@dataclass(frozen=True)
class Answers:
    """What a forward read out of a batch, for exports of the same step with other numbers of samples."""

    batch: Mapping[str, torch.Tensor]
    samples: int
    reads: list[Read]
    """Those that depend on fields in which samples differ."""
    guards: Guards
    uniform: frozenset[str]
    """Fields in which all samples are alike, or that are the same for all samples."""

    def known(self, samples: int) -> Known:
        """The answers for `samples` samples, which are the batch's in turn."""
        order = torch.arange(samples) % self.samples
        rows = {k: v[order] if _batched(v, self.samples) else v for k, v in self.batch.items()}
        return Known(rows, samples, self.reads, self.uniform)


def answer(batch: Mapping[str, Any], samples: int, export: Callable[..., Export]) -> Answers | None:
    """What the step reads out of `batch`, of `samples` samples; None where it reads nothing, or has no data to read.

    Raises:
        CaptureError: where the step cannot be exported with the values either.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if any(t.device.type == "meta" or isinstance(t, FakeTensor) for t in tensors.values()):
        return None
    data = {name: value.detach().cpu() for name, value in tensors.items()}
    known = Known(data, samples)
    failure: CaptureError | None = None
    try:
        export(samples=samples, known=known)
    except CaptureError as error:
        failure = error
    if not known.reads and not known.checks:
        return None
    if failure is not None:
        raise failure
    alike = frozenset(k for k, v in data.items() if _batched(v, samples) and bool((v == v[:1]).all()))
    same = frozenset(k for k, v in data.items() if not _batched(v, samples))
    asked = [read for read in known.reads if not read.fields <= alike | same]
    return Answers(data, samples, asked, known.guards(alike), alike | same)


def guarded(graph: Graph, batch: Mapping[str, Any], samples: int, folded: Collection[str]) -> Graph:
    """`graph`, for batches in which all samples are alike in the fields in which they must be.

    These are what parts that run as they are say of themselves. Where there are `folded` fields, with several rows a
    sample, all as many, such parts read what they like, and where all samples of `batch` have the same whole numbers
    in a field, such as the size of an image, these may say how many rows a sample has.
    """
    needed = frozenset[str]().union(*(region.alike for region in graph.opaque.values()))
    needed |= _alike(batch, samples) if folded and graph.opaque else frozenset()
    if not needed:
        return graph
    found = graph.guards or Guards({}, (), frozenset(), {})
    return replace(graph, guards=replace(found, uniform=found.uniform | needed))


def _alike(batch: Mapping[str, Any], samples: int) -> frozenset[str]:
    """Fields in which all samples have the same whole numbers."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and _batched(v, samples)}
    whole = {k: v for k, v in tensors.items() if not v.is_floating_point() and v.device.type != "meta"}
    return frozenset(k for k, v in whole.items() if not isinstance(v, FakeTensor) and bool((v == v[:1]).all()))


def _batched(value: torch.Tensor, samples: int) -> bool:
    return value.dim() > 0 and value.shape[0] == samples
