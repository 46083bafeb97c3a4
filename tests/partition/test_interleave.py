"""Interleaved candidates: valid, predicted like other plans, and chosen only where they are faster."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from graphs import make_costs, make_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cluster, problems

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.partition.interleave import _even_cuts
from rannc_hf.partition.predict import predict
from rannc_hf.partition.search import find_plan
from rannc_hf.partition.timeline import timeline

GRAPH = make_graph(range(8, 20))
COSTS = make_costs(GRAPH, [100.0] * 12)


def plan_with(memory=10 * GIB, **options):
    return find_plan(GRAPH, COSTS, cluster(1, 4, memory_bytes=memory), 8, RanncConfig(**options))


def test_a_plan_of_the_schedule_is_found_and_predicted():
    plan = plan_with(schedule="interleaved", stages=4, microbatches=4)
    assert plan.schedule == "interleaved" and len(plan.groups) == 4 and len(plan.stages) in (8, 12)
    plan.check(GRAPH, 4)
    assert "each rank runs" in plan.why
    again = predict(plan, GRAPH, COSTS, cluster(1, 4))
    assert again.step_time_us == pytest.approx(plan.step_time_us)
    assert again.stages == plan.stages
    assert timeline(plan, GRAPH, cluster(1, 4)).simulation.step_us == pytest.approx(plan.step_time_us)


def test_it_is_faster_where_the_bubble_is_large():
    other = plan_with(schedule="1f1b", stages=4, microbatches=4)
    plan = plan_with(schedule="interleaved", stages=4, microbatches=4)
    assert plan.step_time_us < 0.9 * other.step_time_us
    # Its ranks hold the same parameters, and more microbatches.
    assert max(s.predicted_memory_bytes for s in plan.stages) > max(s.predicted_memory_bytes for s in other.stages)


def test_replicas_are_those_of_the_groups():
    plan = plan_with(schedule="interleaved", replicas=(1, 3), microbatches=2)
    assert [s.ranks for s in plan.stages[:4]] == [(0,), (1, 2, 3), (0,), (1, 2, 3)]


@settings(max_examples=15, deadline=None)
@given(problems())
def test_they_are_valid_and_fit(problem):
    config = replace(problem.config, schedule="interleaved")
    try:
        plan = find_plan(problem.graph, problem.costs, problem.cluster, problem.batch_size, config)
    except ValueError:
        return
    plan.check(problem.graph, problem.cluster.size)
    assert all(s.predicted_memory_bytes <= problem.memory_bytes for s in plan.stages)


def test_what_is_not_possible_is_said():
    with pytest.raises(ValueError, match="needs two groups of devices or more"):
        plan_with(schedule="interleaved", stages=1)
    with pytest.raises(ValueError, match="12 blocks in the model"):
        find_plan(GRAPH, COSTS, cluster(1, 1), 8, RanncConfig(schedule="interleaved"))
    with pytest.raises(ValueError, match="no plan fits"):
        plan_with(schedule="interleaved", memory=2000)


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=7), st.data())
def test_cuts_have_the_least_largest_part(work, data):
    parts = data.draw(st.integers(1, len(work)))
    ends = _even_cuts(np.array(work), parts)[parts]

    def largest(bounds):
        return max(sum(work[a:b]) for a, b in itertools.pairwise([0, *bounds]))

    assert len(ends) == parts and ends[-1] == len(work) and sorted(set(ends)) == ends
    others = ([*inner, len(work)] for inner in itertools.combinations(range(1, len(work)), parts - 1))
    assert largest(ends) == pytest.approx(min(map(largest, others)))
