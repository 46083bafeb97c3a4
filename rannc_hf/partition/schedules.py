"""The order in which each schedule computes. The engine runs it, the simulation predicts it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

FORWARD, BACKWARD = False, True


class Compute(NamedTuple):
    """One forward or backward."""

    backward: bool
    stage: int
    microbatch: int


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


def _interleaved(group: int, groups: int, chunks: int, microbatches: int) -> list[Compute]:
    """Each group of ranks runs several stages, as far from each other as there are groups (Narayanan et al.,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021).

    Microbatches go through in rounds of as many as there are groups: through all stages of the first lap over the
    groups, then the next lap. A last round that is not full runs as if it were, without what is not there: leaving
    microbatches out of an order that ends leaves one that ends.
    """
    rounds = range(0, microbatches, groups)
    laps = [(lap, m) for first in rounds for lap in range(chunks) for m in range(first, first + groups)]
    forwards = [Compute(FORWARD, lap * groups + group, m) for lap, m in laps]
    backwards = [Compute(BACKWARD, (chunks - 1 - lap) * groups + group, m) for lap, m in laps]
    ahead = min(len(laps), 2 * (groups - group - 1) + (chunks - 1) * groups)
    order = forwards[:ahead]
    for position, backward in enumerate(backwards):
        order += [*forwards[position + ahead : position + ahead + 1], backward]
    return [compute for compute in order if compute.microbatch < microbatches]


INTERLEAVED = "interleaved"
_SINGLE: dict[str, Callable[[int, int, int], Order]] = {"gpipe": _gpipe, "1f1b": _one_f_one_b}
"""Name to (stage, stages, microbatches) to the computes of schedules in which each rank runs one stage."""
SCHEDULES = (*_SINGLE, INTERLEAVED)
SPLIT_SCHEDULE = "gpipe"
"""How a step runs whose loss is computed outside of it (`Graph.split`): that needs all outputs before any gradient."""


def compute_order(
    schedule: str, group: int, stages: int, microbatches: int, groups: int | None = None
) -> list[Compute]:
    """The computes of a group of ranks in order; `groups` of them run `stages` stages, by default one each.

    Group g runs the stages g, g + groups, g + 2 groups and so on. Raises ValueError for a schedule that does not exist.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule {schedule!r}; known are {', '.join(sorted(SCHEDULES))}")
    groups = groups or stages
    if schedule == INTERLEAVED:
        assert stages % groups == 0, (stages, groups)
        return _interleaved(group, groups, stages // groups, microbatches)
    assert groups == stages, (schedule, stages, groups)
    return [Compute(backward, group, m) for backward, m in _SINGLE[schedule](group, stages, microbatches)]


@functools.lru_cache(maxsize=65536)
def in_flight(schedule: str, stage: int, stages: int, microbatches: int, groups: int | None = None) -> int:
    """The most microbatches whose activations `stage` holds at one time, from their forward to their backward.

    Counted on the order itself, so it holds for any schedule. Raises ValueError for one that does not exist.
    """
    held = most = 0
    for backward, own, _ in compute_order(schedule, stage % (groups or stages), stages, microbatches, groups):
        if own == stage:
            held += -1 if backward else 1
            most = max(most, held)
    return most
