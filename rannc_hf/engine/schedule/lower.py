"""From the order of the computes to everything a stage does: receives, sends and the reduction of gradients."""

from __future__ import annotations

from collections.abc import Mapping

from rannc_hf.engine.schedule.actions import Action, ActionKind
from rannc_hf.engine.schedule.registry import compute_order

Edges = Mapping[tuple[int, int], bool]
"""(producer stage, consumer stage), producer < consumer, to whether gradients flow back. May skip stages."""


def lower(schedule: str, stages: int, microbatches: int, edges: Edges) -> list[list[Action]]:
    """The actions of a training step for each stage; all replicas of a stage run the same list.

    The receives of a compute are posted before the compute that precedes it, so that they overlap with it. Sends
    follow the compute that made their values, towards the nearest stage first: it is the one that waits. The last
    action of each stage reduces its gradients.

    Raises `ValueError` for a schedule that does not exist or an edge that does not lead forward.
    """
    check_edges(edges, stages)
    return [
        [*_with_messages(stage, compute_order(schedule, stage, stages, microbatches), edges), reduce_action(stage)]
        for stage in range(stages)
    ]


def lower_forward(stages: int, microbatches: int, edges: Edges) -> list[list[Action]]:
    """The actions of an evaluation for each stage: forwards only. Raises `ValueError` as `lower` does."""
    check_edges(edges, stages)
    order = [(ActionKind.FORWARD, microbatch) for microbatch in range(microbatches)]
    return [_with_messages(stage, order, edges) for stage in range(stages)]


def reduce_action(stage: int) -> Action:
    """The action that ends a training step."""
    return Action(ActionKind.REDUCE_GRAD, stage)


def check_edges(edges: Edges, stages: int) -> None:
    """Raise `ValueError` unless all edges lead from a stage to a later one."""
    for producer, consumer in edges:
        if not 0 <= producer < consumer < stages:
            raise ValueError(
                f"edge from stage {producer} to stage {consumer} does not lead forward within {stages} stages"
            )


def _with_messages(stage: int, order: list[tuple[ActionKind, int]], edges: Edges) -> list[Action]:
    before = sorted((p for p, c in edges if c == stage), reverse=True)
    after = sorted(c for p, c in edges if p == stage)
    gradient_before = [p for p in before if edges[p, stage]]
    gradient_after = [c for c in after if edges[stage, c]]

    def receives(kind: ActionKind, microbatch: int) -> list[Action]:
        if kind is ActionKind.FORWARD:
            return [Action(ActionKind.RECV_ACT, stage, microbatch, p) for p in before]
        return [Action(ActionKind.RECV_GRAD, stage, microbatch, c) for c in gradient_after]

    def sends(kind: ActionKind, microbatch: int) -> list[Action]:
        if kind is ActionKind.FORWARD:
            return [Action(ActionKind.SEND_ACT, stage, microbatch, c) for c in after]
        return [Action(ActionKind.SEND_GRAD, stage, microbatch, p) for p in gradient_before]

    actions = receives(*order[0]) if order else []
    for position, (kind, microbatch) in enumerate(order):
        if position + 1 < len(order):
            actions += receives(*order[position + 1])
        actions.append(Action(kind, stage, microbatch))
        actions += sends(kind, microbatch)
    return actions
