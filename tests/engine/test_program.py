"""Placing graphs on stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.engine.program import parameter_stages, place
from tests.parity.harness import even_plan
from tests.parity.models import CASES


@pytest.fixture(scope="module")
def t5() -> Graph:
    case = CASES["t5"]
    return capture(case.model(), case.batch_as(4))


def test_every_block_runs_once_and_every_parameter_is_placed(t5: Graph):
    plan = even_plan(t5, (1, 1, 1, 1), 2, 4)
    program = place(t5, plan, t5)
    assert [b.index for s in program.stages for b in s.blocks] == list(range(len(t5.blocks)))
    holders = parameter_stages(t5, plan)
    assert set(holders) == set(t5.parameters)
    for stage in program.stages:
        for block in stage.blocks:
            assert all(stage.index in holders[name] for name in block.parameters)
    assert len(holders["shared.weight"]) > 1, "the tied embedding is used by several stages"


def test_skip_edges_go_straight_to_their_consumer(t5: Graph):
    program = place(t5, even_plan(t5, (1, 1, 1, 1), 2, 4), t5)
    edges = {(e.producer, e.consumer): e for e in program.edges}
    skipping = [(p, c) for p, c in edges if c - p > 1]
    assert skipping, "the encoder's output is used by every stage of the decoder"
    for edge in program.edges:
        assert set(edge.gradients) <= set(edge.values)
        for value in edge.values:
            assert value in program.stages[edge.producer].outputs
            assert value in program.stages[edge.consumer].inputs


def test_preamble_values_are_never_sent(t5: Graph):
    program = place(t5, even_plan(t5, (1, 1, 1, 1), 2, 4), t5)
    sent = {v for e in program.edges for v in e.values}
    assert not sent & t5.preamble


def test_an_evaluation_graph_follows_the_parameters(t5: Graph):
    case = CASES["t5"]
    plan = even_plan(t5, (1, 1, 1), 2, 4)
    model = case.model()
    evaluation = capture(model, case.batch_as(4), training=False)
    holders = parameter_stages(t5, plan)
    # Blocks that do not match the planned ones, as when an evaluation takes another path: one block of everything.
    whole = replace(
        evaluation.blocks[0],
        nodes=tuple(n for b in evaluation.blocks for n in b.nodes),
        parameters=tuple({p: None for b in evaluation.blocks for p in b.parameters}),
    )
    program = place(replace(evaluation, blocks=(whole,)), plan, t5)
    placed = [n for s in program.stages for b in s.blocks for n in b.nodes]
    assert sorted(placed) == sorted(whole.nodes)
    for stage in program.stages:
        for block in stage.blocks:
            assert all(stage.index in holders[p] for p in block.parameters)
    assert all(e.producer < e.consumer and not e.gradients for e in program.edges)
    assert set(program.user_outputs) == {"loss", "logits", "encoder_last_hidden_state"}


class TwoLosses(nn.Module):
    """A loss of the first layer's result, made after the second layer has run, and one of the second's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        second = self.layers[1](first)
        return first.square().mean() + second.square().mean()


def test_sums_over_samples_stay_on_one_stage():
    batch = {"x": torch.zeros(4, 3)}
    graph = capture(TwoLosses(), batch)
    plan = even_plan(graph, (1, 2), 1, 4)
    evaluation = capture(TwoLosses(), batch, training=False)
    whole = replace(
        evaluation.blocks[0],
        nodes=tuple(n for b in evaluation.blocks for n in b.nodes),
        parameters=tuple(p for b in evaluation.blocks for p in b.parameters),
    )
    program = place(replace(evaluation, blocks=(whole,)), plan, graph)
    assert evaluation.sums
    for stage in program.stages[:-1]:
        assert not evaluation.sums & {n for b in stage.blocks for n in b.nodes}
    assert not evaluation.sums & {v for e in program.edges for v in e.values}
