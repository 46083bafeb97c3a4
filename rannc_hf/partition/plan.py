"""`Plan`: which blocks run on which ranks, and how a batch flows through them.

A plan is a value: JSON in and out, edited by hand, hashed against the graph it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Blocks `first_block` to `last_block` (inclusive) on `ranks`, one replica a rank."""

    first_block: int
    last_block: int
    ranks: tuple[int, ...]
    recompute: str = "none"
    """"none", or "blocks": keep only the inputs of each block and compute it again in the backward."""
    predicted_forward_us: float = 0.0
    predicted_backward_us: float = 0.0
    predicted_memory_bytes: int = 0

    @property
    def replicas(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Plan:
    """Stages in order, with the batch and the schedule they run."""

    stages: tuple[StagePlan, ...]
    batch_size: int
    """Samples of the global batch the plan was made for."""
    microbatches: int
    schedule: str
    """"gpipe" or "1f1b"."""
    graph_hash: str

    @property
    def world_size(self) -> int:
        return sum(s.replicas for s in self.stages)
