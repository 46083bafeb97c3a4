"""The schedules by name: the orders that the planner knows, as actions of the engine."""

from __future__ import annotations

from rannc_hf.engine.schedule.actions import ActionKind
from rannc_hf.partition import schedules
from rannc_hf.partition.schedules import SCHEDULES as SCHEDULES
from rannc_hf.partition.schedules import in_flight as in_flight


def compute_order(schedule: str, stage: int, stages: int, microbatches: int) -> list[tuple[ActionKind, int]]:
    """The forwards and backwards of `stage` in order. Raises `ValueError` for a schedule that does not exist."""
    order = schedules.compute_order(schedule, stage, stages, microbatches)
    return [(ActionKind.BACKWARD if backward else ActionKind.FORWARD, m) for backward, m in order]
