"""The order in which each schedule computes. The engine runs it, the simulation predicts it."""

from __future__ import annotations

import functools
from collections.abc import Callable

FORWARD, BACKWARD = False, True

Order = list[tuple[bool, int]]
"""(is backward, microbatch) of each compute of a stage."""


def _gpipe(stage: int, stages: int, microbatches: int) -> Order:
    """All forwards, then all backwards (Huang et al., "GPipe", NeurIPS 2019).

    Backwards run in the order of the forwards, so the stage that starts a microbatch first also ends it first.
    """
    return [(FORWARD, m) for m in range(microbatches)] + [(BACKWARD, m) for m in range(microbatches)]


def _one_f_one_b(stage: int, stages: int, microbatches: int) -> Order:
    """One forward, one backward in turn (Narayanan et al., "PipeDream", SOSP 2019; the variant that flushes the
    pipeline at the end of each step, "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021).

    A stage starts with as many forwards as there are stages from it to the end: that many microbatches are in flight
    when the first gradient comes back.
    """
    ahead = min(microbatches, stages - stage)
    order = [(FORWARD, m) for m in range(ahead)]
    for microbatch in range(microbatches):
        order.append((BACKWARD, microbatch))
        if microbatch + ahead < microbatches:
            order.append((FORWARD, microbatch + ahead))
    return order


SCHEDULES: dict[str, Callable[[int, int, int], Order]] = {"gpipe": _gpipe, "1f1b": _one_f_one_b}
"""Name to (stage, stages, microbatches) to the stage's computes."""


def compute_order(schedule: str, stage: int, stages: int, microbatches: int) -> Order:
    """The computes of `stage` in order. Raises ValueError for a schedule that does not exist."""
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule {schedule!r}; known are {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[schedule](stage, stages, microbatches)


@functools.lru_cache(maxsize=65536)
def in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """The most microbatches whose activations `stage` holds at one time, from their forward to their backward.

    Counted on the order itself, so it holds for any schedule. Raises ValueError for one that does not exist.
    """
    held = most = 0
    for backward, _ in compute_order(schedule, stage, stages, microbatches):
        held += -1 if backward else 1
        most = max(most, held)
    return most
