"""GPipe: all forwards, then all backwards (Huang et al., "GPipe", NeurIPS 2019)."""

from __future__ import annotations

from rannc_hf.engine.schedule.actions import ActionKind


def compute_order(stage: int, stages: int, microbatches: int) -> list[tuple[ActionKind, int]]:
    """The forwards and backwards of `stage` (of `stages`) with their microbatch, in order.

    Backwards run in the order of the forwards, so the stage that starts a microbatch first also ends it first.
    """
    forwards = [(ActionKind.FORWARD, m) for m in range(microbatches)]
    return forwards + [(ActionKind.BACKWARD, m) for m in range(microbatches)]
