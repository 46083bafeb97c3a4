"""The schedules by name, and what the planner needs to know about them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from rannc_hf.engine.schedule import gpipe, one_f_one_b
from rannc_hf.engine.schedule.actions import ActionKind

ComputeOrder = Callable[[int, int, int], list[tuple[ActionKind, int]]]
"""(stage, stages, microbatches) to the stage's forwards and backwards in order."""

SCHEDULES: dict[str, ComputeOrder] = {"gpipe": gpipe.compute_order, "1f1b": one_f_one_b.compute_order}


def compute_order(schedule: str, stage: int, stages: int, microbatches: int) -> list[tuple[ActionKind, int]]:
    """The forwards and backwards of `stage` in order. Raises `ValueError` for a schedule that does not exist."""
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule {schedule!r}; known are {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[schedule](stage, stages, microbatches)


@functools.lru_cache(maxsize=65536)
def in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """The most microbatches whose activations `stage` holds at one time, from their forward to their backward.

    Counted on the order itself, so it holds for any schedule. Raises `ValueError` for one that does not exist.
    """
    held = most = 0
    for kind, _ in compute_order(schedule, stage, stages, microbatches):
        held += 1 if kind is ActionKind.FORWARD else -1
        most = max(most, held)
    return most
