"""The planner, asked for the devices at hand."""

from __future__ import annotations

import os
from collections.abc import Collection

import torch

from rannc_hf.capture import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.cost.choose import costs_of, graph_to_run
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.search import find_plan


def find_plan_here(
    graph: Graph,
    config: RanncConfig,
    batch_size: int,
    device: torch.device,
    world_size: int,
    unpadded: Collection[str] = (),
) -> Plan:
    """The best plan for training `graph` on `world_size` devices like `device`.

    `unpadded` names the attention masks that hide nothing in the batch that is planned for: steps without padding run
    faster attention, so that is what costs are taken of.

    Raises:
        ValueError: when options of `config` cannot be met; `PlanError` when nothing fits into memory.
    """
    # Ranks that are threads of one process have no launcher that would set the variable for them.
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    cluster = Cluster.here(world_size, local, device.type)
    running = graph_to_run(graph, unpadded)
    costs, _ = costs_of(running, cluster.device, device, batch_size, config.costs)
    return find_plan(running, costs, cluster, batch_size, config)
