"""1F1B: one forward, one backward in turn, so few microbatches are in flight (Narayanan et al., "PipeDream", SOSP 2019;
the variant that flushes the pipeline at the end of each step, "Memory-Efficient Pipeline-Parallel DNN Training", 2021).
"""

from __future__ import annotations

from rannc_hf.engine.schedule.actions import ActionKind


def compute_order(stage: int, stages: int, microbatches: int) -> list[tuple[ActionKind, int]]:
    """The forwards and backwards of `stage` (of `stages`) with their microbatch, in order.

    A stage starts with as many forwards as there are stages from it to the end: that many microbatches are in
    flight when the first gradient comes back.
    """
    ahead = min(microbatches, stages - stage)
    order = [(ActionKind.FORWARD, m) for m in range(ahead)]
    for microbatch in range(microbatches):
        order.append((ActionKind.BACKWARD, microbatch))
        if microbatch + ahead < microbatches:
            order.append((ActionKind.FORWARD, microbatch + ahead))
    return order
