"""The planner, asked for the devices at hand."""

from __future__ import annotations

import torch

from rannc_hf.capture import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.partition.plan import Plan


def find_plan_for(
    graph: Graph,
    config: RanncConfig,
    batch_size: int,
    device: torch.device,
    world_size: int,
) -> Plan:
    """The best plan for training `graph` on `world_size` devices like `device`."""
    from rannc_hf.partition.search import find_plan
    raise NotImplementedError
