"""More devices never make a plan slower: it may leave some idle."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from graphs import make_costs, make_graph
from hypothesis import given, settings
from problems import cluster, problems

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import Link
from rannc_hf.partition.fewer import parts
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.predict import predict
from rannc_hf.partition.problem import Problem
from rannc_hf.partition.search import find_plan
from rannc_hf.partition.timeline import timeline

SETTINGS = settings(max_examples=7, deadline=None, derandomize=True)


def step(problem, nodes, devices):
    larger = replace(problem.cluster, nodes=nodes, devices_per_node=devices)
    try:
        plan = find_plan(problem.graph, problem.costs, larger, problem.batch_size, problem.config)
    except ValueError:
        return float("inf")
    plan.check(problem.graph, larger.size)
    return plan.step_time_us


@SETTINGS
@given(problems())
def test_more_devices_are_never_slower(problem):
    steps = {pair: step(problem, *pair) for pair in itertools.product((1, 2, 3), (1, 2, 3))}
    for (nodes, devices), slower in steps.items():
        for more in ((nodes + 1, devices), (nodes, devices + 1)):
            # Not one that is faster by rounding only.
            assert steps.get(more, 0.0) <= slower * (1 + 1e-12), (steps, more)


GRAPH = make_graph([11, 12, 13, 14, 15, 16])
COSTS = make_costs(GRAPH, [10, 12, 9, 11, 10, 30])


def plan_with(where, batch=32, **options):
    return find_plan(GRAPH, COSTS, where, batch, RanncConfig(**options))


def test_a_batch_too_small_leaves_devices_idle():
    plan = plan_with(cluster(1, 8), batch=1)
    used = sorted(rank for s in plan.stages for rank in s.ranks)
    assert used == list(range(len(used))) and plan.idle == tuple(range(len(used), 8)) and plan.world_size == 8
    assert "leaves ranks" in plan.why and "IDLE" in plan.why and "no plan on all ranks fits" in plan.why
    assert Plan.from_json(plan.to_json()) == plan
    plan.check(GRAPH, 8)


def test_a_slow_link_leaves_a_node_idle():
    slow = replace(cluster(2, 2), inter=Link("slow", 1.0, 1e3))
    plan = plan_with(slow)
    alone = plan_with(cluster(1, 2))
    assert plan.idle == (2, 3) and replace(alone, idle=plan.idle, why="", runners_up=()) == replace(
        plan, why="", runners_up=()
    )
    assert "leaves ranks 2-3 IDLE, since the best plan on all ranks is" in plan.why
    # What the planner said is what others say of the plan, wherever the devices are that it uses.
    assert predict(plan, GRAPH, COSTS, slow) == plan
    assert timeline(plan, GRAPH, slow).simulation.step_us == plan.step_time_us


def test_options_say_how_many_devices_there_are():
    with pytest.raises(ValueError, match="replicas=\\[1\\] are 1 ranks, but there are 2"):
        plan_with(cluster(1, 2), replicas=(1,))
    assert len(plan_with(replace(cluster(2, 2), inter=Link("slow", 1.0, 1e3)), stages=2).stages) == 2
    assert plan_with(cluster(1, 5), stages=3, schedule="interleaved", batch=3).schedule == "interleaved"


def test_parts_of_a_cluster():
    def shapes(nodes, devices, **options):
        problem = Problem(GRAPH, COSTS, cluster(nodes, devices), 32, RanncConfig(**options))
        return [(p.cluster.nodes, p.cluster.devices_per_node) for p in parts(problem)]

    assert shapes(1, 4) == [(1, 3), (1, 2), (1, 1)] and shapes(1, 4, stages=2) == [(1, 3), (1, 2)]
    assert shapes(2, 2) == [(1, 2), (2, 1), (1, 1)] and shapes(2, 2, replicas=(2, 2)) == []
    # So many that only regular ones are searched.
    large = shapes(100, 8)
    assert large[:4] == [(64, 8), (100, 4), (32, 8), (64, 4)] and large[-1] == (1, 1)
    assert not {(99, 8), (3, 8), (2, 3)} & set(large)


def test_ranks_of_parts():
    whole = cluster(3, 4)
    part = whole.part(2, 3)
    ranks = [whole.rank_of(part, rank) for rank in range(6)]
    assert ranks == [0, 1, 2, 4, 5, 6]
    assert whole.used_by(ranks) == (part, dict(zip(ranks, range(6))))
    assert whole.used_by([3, 9, 2, 8])[1] == {2: 0, 3: 1, 8: 2, 9: 3}
    assert whole.used_by([0, 1, 4]) == (whole, {0: 0, 1: 1, 4: 4})
