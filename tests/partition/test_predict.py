"""Predictions of plans that are given: those of the search, and edited ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from graphs import make_costs, make_graph
from hypothesis import given, settings
from problems import cluster, problems

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.partition.plan import Plan, StagePlan
from rannc_hf.partition.predict import check_memory, predict
from rannc_hf.partition.search import PlanError, find_plan


def stripped(plan):
    stages = tuple(StagePlan(s.first_block, s.last_block, s.ranks, s.recompute, s.shard) for s in plan.stages)
    return replace(plan, stages=stages, step_time_us=0.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_a_plan_of_the_search_is_predicted_as_the_search_did(problem):
    try:
        plan = find_plan(problem.graph, problem.costs, problem.cluster, problem.batch_size, problem.config)
    except PlanError:
        return
    assert predict(stripped(plan), problem.graph, problem.costs, problem.cluster) == plan


GRAPH = make_graph([11, 12, 13, 14])
COSTS = make_costs(GRAPH, [10, 12, 9, 11])


def made(*stages, microbatches=4, schedule="1f1b"):
    return Plan(stages, 16, microbatches, schedule, GRAPH.structural_hash, why="by hand")


def predicted(*stages, nodes=2, per_node=2, **changes):
    return predict(made(*stages, **changes), GRAPH, COSTS, cluster(nodes, per_node))


def test_ranks_may_be_anywhere():
    near = predicted(StagePlan(0, 1, (0, 1)), StagePlan(2, 3, (2, 3)))
    swapped = predicted(StagePlan(0, 1, (3, 2)), StagePlan(2, 3, (1, 0)))
    split = predicted(StagePlan(0, 1, (0, 3)), StagePlan(2, 3, (2, 1)))
    assert swapped.step_time_us == near.step_time_us
    assert [s.ranks for s in swapped.stages] == [(3, 2), (1, 0)] and swapped.why == "by hand"
    # Gradients of both stages go over the slow link between the nodes.
    assert split.step_time_us > near.step_time_us


def test_what_an_edit_costs():
    even = predicted(StagePlan(0, 1, (0,)), StagePlan(2, 3, (1,)), nodes=1)
    uneven = predicted(StagePlan(0, 2, (0,)), StagePlan(3, 3, (1,)), nodes=1)
    again = predicted(StagePlan(0, 1, (0,), "blocks"), StagePlan(2, 3, (1,)), nodes=1)
    gpipe = predicted(StagePlan(0, 1, (0,)), StagePlan(2, 3, (1,)), nodes=1, schedule="gpipe")
    assert uneven.step_time_us > even.step_time_us
    assert again.stages[0].predicted_backward_us == pytest.approx(
        even.stages[0].predicted_backward_us + even.stages[0].predicted_forward_us
    )
    assert gpipe.stages[0].predicted_memory_bytes > even.stages[0].predicted_memory_bytes


def test_a_single_replica_divides_nothing():
    plain = predicted(StagePlan(0, 1, (0,)), StagePlan(2, 3, (1,)), nodes=1)
    for shard in ("optimizer", "gradients", "parameters"):
        named = predicted(StagePlan(0, 1, (0,), shard=shard), StagePlan(2, 3, (1,)), nodes=1)
        assert replace(named, stages=(replace(named.stages[0], shard="none"), named.stages[1])) == plain


def test_a_wrong_plan_is_refused():
    with pytest.raises(ValueError, match=r"`stages\[1\].first_block` is 3"):
        predicted(StagePlan(0, 1, (0,)), StagePlan(3, 3, (1,)), nodes=1)
    with pytest.raises(ValueError, match=r"`stages\[\*\].ranks` use 2 ranks, but there are 4"):
        predicted(StagePlan(0, 1, (0,)), StagePlan(2, 3, (1,)))
    with pytest.raises(ValueError, match=r"`graph_hash`"):
        predict(replace(made(), graph_hash="other"), GRAPH, COSTS, cluster(1, 2))


def test_memory_is_checked_against_a_limit():
    plan = find_plan(GRAPH, COSTS, cluster(1, 2), 16, RanncConfig(stages=2))
    needs = [s.predicted_memory_bytes for s in plan.stages]
    check_memory(plan, max(needs))
    larger = needs.index(max(needs))
    with pytest.raises(PlanError) as caught:
        check_memory(plan, max(needs) - 1)
    text = str(caught.value)
    assert f"stages[{larger}] needs {max(needs) / GIB:.4g} GiB on each of its ranks ({larger})" in text
    assert f"stages[{1 - larger}]" not in text
