"""Actions made ready to run: which messages they have, and that they are made once."""

from __future__ import annotations

import pytest
import torch

from rannc_hf.capture import Graph, capture
from rannc_hf.engine.instructions import Instruction, Preparation
from rannc_hf.engine.program import Program, place
from rannc_hf.engine.schedule import Action, ActionKind, lower
from rannc_hf.partition.plan import Plan
from tests.parity.harness import even_plan, on_ranks, planner, shards
from tests.parity.models import CASES

SIZES = (5, 4)


@pytest.fixture(scope="module")
def t5() -> Graph:
    case = CASES["t5"]
    return capture(case.model(), case.batch_as(4))


def prepared(graph: Graph, plan: Plan) -> tuple[Program, list[list[tuple[Action, Instruction]]]]:
    """For each rank its actions with the instructions made of them."""
    program = place(graph, plan, graph)
    edges = {(e.producer, e.consumer): bool(e.gradients) for e in program.edges}
    lists = lower(plan.schedule, len(plan.stages), len(SIZES), edges, len(plan.groups))
    ranks = []
    for rank in range(plan.world_size):
        preparation = Preparation(program, plan, rank)
        own = lists[plan.groups.index(tuple(preparation.held))]
        ranks.append(list(zip(own, preparation.prepare(own, SIZES))))
    return program, ranks


@pytest.mark.parametrize("replicas", [(1, 1), (1, 3), (3, 1), (2, 1, 1), (1, 2, 3)])
def test_every_message_is_sent_once_and_received_with_its_shape(t5: Graph, replicas: tuple[int, ...]):
    program, ranks = prepared(t5, even_plan(t5, replicas, len(SIZES), sum(SIZES)))
    sent: dict[tuple[object, ...], list[tuple[str, int]]] = {}
    received: dict[tuple[object, ...], list[tuple[str, int]]] = {}
    for rank, own in enumerate(ranks):
        for action, instruction in own:
            for message in instruction.messages:
                key = (message.channel, rank, message.peer)
                sent.setdefault(key, []).append((message.value, message.length))
            for buffer in instruction.buffers:
                spec = program.graph.values[buffer.value]
                samples = instruction.stop - instruction.start
                assert buffer.shape == (spec.at(samples) if spec.batch_dim is not None else spec.shape)
                assert buffer.dtype == spec.dtype
                for message in buffer.messages:
                    key = (message.channel, message.peer, rank)
                    received.setdefault(key, []).append((message.value, message.length))
                if spec.batch_dim is not None:
                    assert sum(m.length for m in buffer.messages) == samples, action
    assert sent
    assert sent == received


def test_values_are_freed_with_the_last_send_that_takes_them(t5: Graph):
    program, ranks = prepared(t5, even_plan(t5, (1, 1, 1, 1), len(SIZES), sum(SIZES)))
    for own in ranks:
        freed: list[tuple[int, str]] = []
        for action, instruction in own:
            if action.kind is not ActionKind.SEND_ACT:
                continue
            for message in instruction.messages:
                assert (action.microbatch, message.value) not in freed, "sent after it was freed"
            freed += [(action.microbatch, value) for value in instruction.frees]
        leaving = {v for e in program.edges if e.producer == own[0][0].stage for v in e.values}
        assert sorted(freed) == sorted((m, v) for m in range(len(SIZES)) for v in leaving)


def test_the_last_backward_is_marked(t5: Graph):
    _, ranks = prepared(t5, even_plan(t5, (1, 1), len(SIZES), sum(SIZES)))
    for own in ranks:
        marked = [str(action) for action, instruction in own if instruction.last]
        assert marked == [str([a for a, _ in own if a.kind is ActionKind.BACKWARD][-1])]


def test_messages_say_what_they_are(t5: Graph):
    _, ranks = prepared(t5, even_plan(t5, (1, 3), len(SIZES), sum(SIZES)))
    sends = [m for a, i in ranks[0] if a.kind is ActionKind.SEND_ACT for m in i.messages]
    assert sends[0].what == f"stage 0 replica 0: activation {sends[0].value} of microbatch 0 to stage 1"
    receives = [m for a, i in ranks[2] if a.kind is ActionKind.RECV_ACT for b in i.buffers for m in b.messages]
    assert receives[0].what == f"stage 1 replica 1: activation {receives[0].value} of microbatch 0 from stage 0"


def test_steps_of_equal_sizes_share_their_instructions():
    case = CASES["bert"]
    parts = shards(case.batch_as(8), 2)

    def run(wrapped, optimizer, rank):
        made = []
        for _ in range(2):
            wrapped(**parts[rank]).loss.backward()
            (runtime,) = wrapped._runtimes.values()
            made.append(list(runtime._prepared.values()))
        (first,), (second,) = made
        return first is second

    assert on_ranks(case.model(torch.float32), 2, planner((1, 1), 2), run) == [True, True]
