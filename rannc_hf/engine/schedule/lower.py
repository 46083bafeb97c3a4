"""From the order of the computes to everything a stage does: receives, sends and the reduction of gradients."""

from __future__ import annotations

from collections.abc import Mapping

from rannc_hf.engine.schedule.actions import Action, ActionKind
from rannc_hf.engine.schedule.registry import compute_order
from rannc_hf.partition.schedules import INTERLEAVED

Edges = Mapping[tuple[int, int], bool]
"""(producer stage, consumer stage), producer < consumer, to whether gradients flow back. May skip stages."""


def lower(schedule: str, stages: int, microbatches: int, edges: Edges, groups: int | None = None) -> list[list[Action]]:
    """The actions of a training step for each group of ranks; the ranks of a group run the same list.

    There are `groups` of them, by default one for each stage. The receives of a compute are posted before the compute
    that precedes it, so that they overlap with it. Sends follow the compute that made their values, towards the nearest
    stage first: it is the one that waits. The last action of each list reduces gradients.

    Raises `ValueError` for a schedule that does not exist or an edge that does not lead forward.
    """
    check_edges(edges, stages)
    return [
        [*_with_messages(compute_order(schedule, group, stages, microbatches, groups), edges), reduce_action(group)]
        for group in range(groups or stages)
    ]


def lower_forward(stages: int, microbatches: int, edges: Edges, groups: int | None = None) -> list[list[Action]]:
    """The actions of an evaluation for each group of ranks: forwards only. Raises `ValueError` as `lower` does."""
    check_edges(edges, stages)
    # Forwards are in the same order in all schedules with as many groups.
    orders = [compute_order(INTERLEAVED, group, stages, microbatches, groups) for group in range(groups or stages)]
    return [_with_messages([a for a in order if a.kind is ActionKind.FORWARD], edges) for order in orders]


def lower_backward(stages: int, microbatches: int, edges: Edges, groups: int | None = None) -> list[list[Action]]:
    """The actions that complete `lower_forward` to a training step. Raises `ValueError` as `lower` does."""
    check_edges(edges, stages)
    orders = [compute_order(INTERLEAVED, group, stages, microbatches, groups) for group in range(groups or stages)]
    return [
        [*_with_messages([a for a in order if a.kind is ActionKind.BACKWARD], edges), reduce_action(group)]
        for group, order in enumerate(orders)
    ]


def reduce_action(stage: int) -> Action:
    """The action that ends a training step, of the first stage that a rank runs."""
    return Action(ActionKind.REDUCE_GRAD, stage)


def check_edges(edges: Edges, stages: int) -> None:
    """Raise `ValueError` unless all edges lead from a stage to a later one."""
    for producer, consumer in edges:
        if not 0 <= producer < consumer < stages:
            raise ValueError(
                f"edge from stage {producer} to stage {consumer} does not lead forward within {stages} stages"
            )


def _with_messages(order: list[Action], edges: Edges) -> list[Action]:
    """Computes, with the receives and sends that they need around them."""

    def receives(compute: Action) -> list[Action]:
        stage, microbatch = compute.stage, compute.microbatch
        if compute.kind is ActionKind.FORWARD:
            before = sorted((p for p, c in edges if c == stage), reverse=True)
            return [Action(ActionKind.RECV_ACT, stage, microbatch, p) for p in before]
        after = sorted(c for (p, c), gradient in edges.items() if p == stage and gradient)
        return [Action(ActionKind.RECV_GRAD, stage, microbatch, c) for c in after]

    def sends(compute: Action) -> list[Action]:
        stage, microbatch = compute.stage, compute.microbatch
        if compute.kind is ActionKind.FORWARD:
            after = sorted(c for p, c in edges if p == stage)
            return [Action(ActionKind.SEND_ACT, stage, microbatch, c) for c in after]
        before = sorted((p for (p, c), gradient in edges.items() if c == stage and gradient), reverse=True)
        return [Action(ActionKind.SEND_GRAD, stage, microbatch, p) for p in before]

    actions = receives(order[0]) if order else []
    for position, compute in enumerate(order):
        if position + 1 < len(order):
            actions += receives(order[position + 1])
        actions.append(compute)
        actions += sends(compute)
    return actions
