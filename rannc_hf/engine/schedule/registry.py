"""The schedules by name: the orders that the planner knows, as actions of the engine."""

from __future__ import annotations

from rannc_hf.engine.schedule.actions import Action, ActionKind
from rannc_hf.partition import schedules
from rannc_hf.partition.schedules import SCHEDULES as SCHEDULES
from rannc_hf.partition.schedules import in_flight as in_flight


def compute_order(schedule: str, group: int, stages: int, microbatches: int, groups: int | None = None) -> list[Action]:
    """The forwards and backwards of a group of ranks in order; `groups` of them run `stages` stages.

    Raises `ValueError` for a schedule that does not exist.
    """
    order = schedules.compute_order(schedule, group, stages, microbatches, groups)
    return [Action(ActionKind.BACKWARD if backward else ActionKind.FORWARD, s, m) for backward, s, m in order]
