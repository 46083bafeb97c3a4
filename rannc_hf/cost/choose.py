"""Which costs a plan is made from: those of the graph that will run, measured or computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from rannc_hf.capture.graph import Block, Graph
from rannc_hf.capture.instantiate import preamble_function
from rannc_hf.capture.passes.masks import unmask
from rannc_hf.capture.passes.sparse_head import SparseHead, sparse_head
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.cache import CostCache, Hits
from rannc_hf.cost.devices import Device
from rannc_hf.cost.largest import most_labelled
from rannc_hf.cost.measure import measured_costs
from rannc_hf.cost.table import BlockCost, CostTable


def graph_to_run(
    graph: Graph, unpadded: Collection[str], labelled: Callable[[SparseHead], float] | None = None
) -> Graph:
    """The variant of `graph` that steps run.

    `unpadded` are the attention masks that hide nothing in their batches; `labelled` tells the share of the rows of a
    head that have a label, None where all do. The variant has the same blocks over the same parameters: a plan for one
    is a plan for the other.
    """
    found = graph
    variant = unmask(graph)
    if variant is not None and set(variant.fields) <= set(unpadded):
        found = variant.graph
    head = sparse_head(found) if labelled is not None else None
    if head is not None and labelled is not None:
        rows = 1000 * head.rows
        capacity = head.capacity(math.ceil(labelled(head) * rows), 1000)
        found = found if capacity is None else head.variant(capacity)
    assert found.structural_hash == graph.structural_hash
    assert [b.parameters for b in found.blocks] == [b.parameters for b in graph.blocks]
    return found


def labelled_share(graph: Graph, batch: Mapping[str, torch.Tensor], samples: int, head: SparseHead) -> float:
    """The share of a head's rows that have a label in `batch`, fields of `samples` samples on one device."""
    labels = _labels(graph, batch, samples, head)
    return sum(labels) / (samples * head.rows) if labels else 1.0


def most_labelled_share(graph: Graph, batch: Mapping[str, torch.Tensor], samples: int, head: SparseHead) -> float:
    """The largest share of a head's rows with a label that is expected of slices of batches like `batch`."""
    labels = _labels(graph, batch, samples, head)
    return most_labelled(labels, head.rows) if labels else 1.0


def _labels(graph: Graph, batch: Mapping[str, torch.Tensor], samples: int, head: SparseHead) -> list[int]:
    """How many rows of each sample have a label; empty where that is not known before the step."""
    placeholders = {field: placeholder for placeholder, field in graph.batch_inputs.items()}
    device = next(iter(batch.values())).device
    function, inputs = preamble_function(head.graph, (head.target,), samples, device)
    known = {placeholders[f]: v for f, v in batch.items() if f in placeholders}
    known |= {name: value.to(device) for name, value in graph.constants.items()}
    if not all(name in known for name in inputs):
        return []
    (target,) = function(*[known[name] for name in inputs])
    found: list[int] = head.labelled_by_sample(target).tolist()
    return found


def compiled_costs(
    costs: CostTable,
    graph: Graph,
    where: torch.device,
    samples: Mapping[int, Sequence[Block]],
    *,
    recompute: bool = True,
    cached: bool = True,
) -> CostTable:
    """`costs` as they are for blocks that `torch.compile` has made.

    Compiling takes seconds a block and size, so that `samples` says which blocks are measured at which sizes; at others
    each of a block's costs is taken to change by the same factor as at the nearest of its own. `recompute`: whether
    computing forwards again is measured too, which compiles them once more.
    """
    compiled: dict[str, dict[int, BlockCost]] = {}
    for size, blocks in samples.items():
        part = replace(graph, blocks=tuple(blocks))
        if cached:
            made, _ = CostCache().compiled(part, costs.device, where, size, recompute)
        else:
            made = measured_costs(part, costs.device, where, [size], compiled=True, recompute=recompute)
        for key, (new,) in made.points.items():
            compiled.setdefault(key, {})[size] = new
    points = dict(costs.points)
    for key, new_at in compiled.items():
        changed = dict(new_at)
        for old in costs.points[key]:
            near = min(new_at, key=lambda s: (abs(math.log(s / old.samples)), s))
            changed.setdefault(old.samples, _scaled(old, costs.of_key(key, near), new_at[near]))
        points[key] = tuple(changed[size] for size in sorted(changed))
    return replace(costs, points=points)


def _scaled(point: BlockCost, old: BlockCost, new: BlockCost) -> BlockCost:
    """`point` with each cost changed by its factor from `old` to `new`."""
    changed: dict[str, Any] = {}
    for name in (f.name for f in fields(BlockCost) if f.name != "samples"):
        before, after = getattr(old, name), getattr(new, name)
        value = getattr(point, name) * (after / before if before else 1.0)
        changed[name] = value if name.endswith("us") else round(value)
    return replace(point, **changed)


def costs_of(
    graph: Graph,
    device: Device,
    where: torch.device,
    batch_size: int,
    kind: Literal["auto", "measured", "analytic"],
    *,
    cached: bool = True,
) -> tuple[CostTable, Hits]:
    """Costs of `graph` for up to `batch_size` samples on `where`, which `device` describes.

    `kind` "auto" measures on CUDA, where times depend on kernels more than on FLOPs, and computes on a CPU. `cached`:
    whether measured costs are taken from disk and kept there.

    Raises ValueError where a block does not fit on the device with a single sample.
    """
    if kind == "measured" or (kind == "auto" and where.type == "cuda"):
        if not cached:
            made = measured_costs(graph, device, where, batch_size)
            return made, Hits(0, len(made.points))
        return CostCache().measured(graph, device, where, batch_size)
    return analytic_costs(graph, device, batch_size), Hits()
