"""Which costs a plan is made from: those of the graph that will run, measured or computed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from rannc_hf.capture.graph import Graph
from rannc_hf.capture.passes.masks import unmask
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.cache import CostCache, Hits
from rannc_hf.cost.devices import Device
from rannc_hf.cost.measure import measured_costs
from rannc_hf.cost.table import CostTable


def graph_to_run(graph: Graph, unpadded: Collection[str]) -> Graph:
    """The variant of `graph` that steps run whose batches have no padding in the attention masks `unpadded`.

    It has the same blocks over the same parameters: a plan for one is a plan for the other.
    """
    variant = unmask(graph)
    if variant is None or not set(variant.fields) <= set(unpadded):
        return graph
    assert variant.graph.structural_hash == graph.structural_hash
    assert [b.parameters for b in variant.graph.blocks] == [b.parameters for b in graph.blocks]
    return variant.graph


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
