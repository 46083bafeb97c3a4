"""The planner, asked for the devices at hand."""

from __future__ import annotations

import os

import torch

from rannc_hf.capture import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.search import find_plan


def find_plan_here(graph: Graph, config: RanncConfig, batch_size: int, device: torch.device, world_size: int) -> Plan:
    """The best plan for training `graph` on `world_size` devices like `device`.

    Raises:
        ValueError: when options of `config` cannot be met; `PlanError` when nothing fits into memory.
    """
    # Ranks that are threads of one process have no launcher that would set the variable for them.
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    cluster = Cluster.here(world_size, local, device.type)
    return find_plan(graph, analytic_costs(graph, cluster.device, batch_size), cluster, batch_size, config)
