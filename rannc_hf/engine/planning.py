"""The planner, asked for the devices at hand."""

from __future__ import annotations

import logging
import os
from functools import partial

import torch

from rannc_hf.capture import Graph
from rannc_hf.capture.compiled import NotCompiled
from rannc_hf.capture.graph import Block
from rannc_hf.config import RanncConfig
from rannc_hf.cost.choose import compiled_costs, costs_of, graph_to_run, labelled_share, most_labelled_share
from rannc_hf.cost.largest import with_room
from rannc_hf.cost.table import CostTable
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.functions import wants_compiled
from rannc_hf.engine.routes import nominal_slices
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.search import find_plan

logger = logging.getLogger(__name__)

_ROUNDS = 3
"""How often a plan is made again because compiling has changed what is best."""


def cluster_here(world_size: int, device: torch.device) -> Cluster:
    """The devices of this run. Raises ValueError where nodes differ."""
    # Ranks that are threads of one process have no launcher that would set the variable for them.
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    return Cluster.here(world_size, local, device.type)


def find_plan_here(
    graph: Graph,
    config: RanncConfig,
    batch: GlobalBatch,
    device: torch.device,
    world_size: int,
) -> Plan:
    """The best plan for training `graph` with batches like `batch` on `world_size` devices like `device`.

    Costs are taken of what the steps will run: without attention masks where the batch has no padding, the head on as
    many rows as have a label, and compiled blocks where the engine compiles them. Memory suffices for later batches
    that have padding, or more labels (`cost.largest`).

    Raises:
        ValueError: when options of `config` cannot be met; `PlanError` when nothing fits into memory.
    """
    cluster = cluster_here(world_size, device)
    tensors = {name: value for name, value in batch.fields.items() if isinstance(value, torch.Tensor)}
    # Where the script computes the loss, the outputs have all rows.
    usual, most = (
        None if graph.split else partial(share, graph, tensors, batch.samples)
        for share in (labelled_share, most_labelled_share)
    )
    running = graph_to_run(graph, batch.unpadded, usual)
    largest = graph_to_run(graph, (), most)
    costs, _ = costs_of(running, cluster.device, device, batch.samples, config.costs)
    plan = find_plan(largest, with_room(costs, running, largest), cluster, batch.samples, config)
    if costs.source == "measured" and wants_compiled(config, device):
        return _with_compiled_costs(plan, running, largest, costs, cluster, config, device)
    return plan


def _with_compiled_costs(
    plan: Plan,
    graph: Graph,
    largest: Graph,
    costs: CostTable,
    cluster: Cluster,
    config: RanncConfig,
    device: torch.device,
) -> Plan:
    """The best plan by the costs of compiled blocks, which are measured only at the sizes that plans have."""
    sizes: dict[int, dict[str, Block]] = {}
    for _ in range(_ROUNDS):
        missing = False
        for index, stage in enumerate(plan.stages):
            for size in nominal_slices(plan, index):
                blocks = {b.key: b for b in graph.blocks[stage.first_block : stage.last_block + 1]}
                missing |= not blocks.keys() <= sizes.setdefault(size, {}).keys()
                sizes[size].update(blocks)
        if not missing:
            break
        try:
            again = any(stage.recompute != "none" for stage in plan.stages)
            compiled = compiled_costs(
                costs, graph, device, {size: list(found.values()) for size, found in sizes.items()}, recompute=again
            )
        except NotCompiled as error:
            logger.warning("rannc: planned with the costs of uncompiled blocks: %s", error)
            break
        plan = find_plan(largest, with_room(compiled, graph, largest), cluster, plan.batch_size, config)
    return plan
