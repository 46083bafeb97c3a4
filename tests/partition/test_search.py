"""The search against brute force over every plan, and what it does with options and limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from graphs import make_costs, make_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cluster, problems
from reference import all_plans, reference

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB, Link
from rannc_hf.partition.dp import TOLERANCE, best_candidates, fits
from rannc_hf.partition.search import PlanError, find_plan
from rannc_hf.partition.space import limits, microbatch_counts, replica_choices, search
from rannc_hf.partition.stages import StageModel

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


@SETTINGS
@given(problems(), st.sampled_from(["1f1b", "gpipe"]))
def test_search_equals_brute_force(problem, schedule):
    least = {}
    for microbatches in microbatch_counts(problem):
        estimates = [
            e
            for placement, stages in all_plans(problem, microbatches)
            if (e := reference(problem, microbatches, schedule, placement, stages)) is not None
        ]
        expected = min(estimates, default=None)
        model = StageModel(problem, microbatches, replica_choices(problem, microbatches))
        found = best_candidates(model, schedule, limits(problem), float("inf"), tolerance=0)
        assert fits(model, schedule, limits(problem)) == (expected is not None)
        if expected is None:
            assert not found
            continue
        assert found[0].estimate_us == pytest.approx(expected, rel=1e-9)
        # With a tight bound from the start, what cannot be better is dropped early, but not the best plan.
        tight = best_candidates(model, schedule, limits(problem), expected * (1 + 1e-6), tolerance=0)
        assert tight and tight[0].estimate_us == pytest.approx(expected, rel=1e-9)
        for c in found:
            again = reference(problem, microbatches, schedule, c.placement, c.stages)
            assert c.estimate_us == pytest.approx(again, rel=1e-9)
        least[microbatches] = expected
    candidates = search(replace(problem, config=replace(problem.config, schedule=schedule)), {})
    assert bool(candidates) == bool(least)
    if least:
        assert candidates[0].estimate_us <= min(least.values()) * (1 + 2 * TOLERANCE)


@SETTINGS
@given(problems())
def test_every_plan_is_valid(problem):
    try:
        plan = find_plan(problem.graph, problem.costs, problem.cluster, problem.batch_size, problem.config)
    except PlanError:
        return
    plan.check(problem.graph, problem.cluster.size)
    assert all(s.replicas <= problem.batch_size // plan.microbatches for s in plan.stages)
    run = [b for s in plan.stages for b in range(s.first_block, s.last_block + 1)]
    assert run == list(range(len(problem.graph.blocks)))
    for stage in plan.stages:
        assert stage.replicas > 1 or stage.shard == "none"
        assert stage.replicas == 1 or problem.config.shard in ("auto", stage.shard)
    assert all(s.predicted_memory_bytes <= problem.memory_bytes for s in plan.stages)
    placed = {
        p for s in plan.stages for b in problem.graph.blocks[s.first_block : s.last_block + 1] for p in b.parameters
    }
    assert placed == set(problem.graph.parameters)


@SETTINGS
@given(problems())
def test_more_memory_is_never_slower(problem):
    def step(memory):
        try:
            wide = replace(problem, cluster=replace(problem.cluster, device=replace(device, memory_bytes=memory)))
            return min(c.estimate_us for c in search(wide, {}))
        except ValueError:
            return float("inf")

    device = problem.cluster.device
    steps = [step(m) for m in (20_000, 40_000, 80_000, 10 * GIB)]
    assert all(b <= a * (1 + 2 * TOLERANCE) for a, b in itertools.pairwise(steps))


FREE = Link("free", 0.0, float("inf"))


@SETTINGS
@given(problems(), st.sampled_from([8, 16]))
def test_twice_the_devices_are_never_slower_where_links_cost_nothing(problem, batch):
    """Twice the replicas of each stage and half the microbatches: each device does half the work at the same pace.

    With links that cost something this does not hold: a reduction over more ranks takes longer.
    """

    def step(devices):
        larger = replace(problem.cluster, nodes=1, devices_per_node=devices, intra=FREE, inter=FREE)
        try:
            return search(replace(problem, cluster=larger, batch_size=batch), {})[0].estimate_us
        except (ValueError, IndexError):
            return float("inf")

    steps = [step(devices) for devices in (1, 2, 4)]
    assert all(b <= a * (1 + 2 * TOLERANCE) for a, b in itertools.pairwise(steps))


# -- options ---------------------------------------------------------------------------------------------------------

GRAPH = make_graph([11, 12, 13, 14, 15, 16])
COSTS = make_costs(GRAPH, [10, 12, 9, 11, 10, 30])


def plan_with(devices=(1, 4), batch=32, memory=10 * GIB, **options):
    return find_plan(GRAPH, COSTS, cluster(*devices, memory_bytes=memory), batch, RanncConfig(**options))


def test_options_are_kept():
    assert len(plan_with(stages=3).stages) == 3
    assert [s.replicas for s in plan_with(replicas=(1, 3)).stages] == [1, 3]
    assert [s.replicas for s in plan_with(replicas=(2, 1, 1)).stages] == [2, 1, 1]
    assert plan_with(microbatches=8).microbatches == 8
    for schedule in ("gpipe", "1f1b"):
        assert plan_with(schedule=schedule, stages=2).schedule == schedule
    for recompute in ("none", "blocks"):
        assert {s.recompute for s in plan_with(recompute=recompute).stages} == {recompute}
    one = plan_with(stages=1)
    assert [s.ranks for s in one.stages] == [(0, 1, 2, 3)]


def test_the_plan_says_what_it_predicts():
    plan = plan_with(stages=2)
    assert plan.step_time_us > 0 and plan.why and plan.graph_hash == GRAPH.structural_hash
    assert all(s.predicted_forward_us > 0 and s.predicted_memory_bytes > 0 for s in plan.stages)
    assert 0 < len(plan.runners_up) <= 5
    assert all("slower" in r.reason for r in plan.runners_up)
    shapes = {(r.replicas, r.microbatches) for r in plan.runners_up}
    assert len(shapes) == len(plan.runners_up)
    assert plan == plan_with(stages=2), "the same input gives the same plan"


def test_memory_that_lacks_brings_recomputation():
    roomy = plan_with(stages=1, microbatches=4, shard="none")
    need = roomy.stages[0].predicted_memory_bytes
    tight = plan_with(stages=1, microbatches=4, shard="none", memory_limit_gib=0.93 * need / GIB)
    assert roomy.stages[0].recompute == "none"
    assert tight.stages[0].recompute == "blocks"
    assert tight.stages[0].predicted_memory_bytes <= 0.93 * need
    assert tight.stages[0].predicted_backward_us > roomy.stages[0].predicted_backward_us
    assert tight.step_time_us > roomy.step_time_us


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 5}, r"stages=5 is not possible with 4 devices and 6 blocks.*at most 4"),
        ({"replicas": (1, 1)}, r"replicas=\[1, 1\] are 2 ranks, but there are 4"),
        ({"microbatches": 64}, r"microbatches=64 does not cut a batch of 32 samples.*32 does"),
        ({"microbatches": 20}, r"microbatches=20 does not cut.*16 does"),
        ({"microbatches": 16, "replicas": (1, 3)}, r"microbatches=16 leaves 2 samples.*replicas=\[1, 3\] need 3"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plan_with(**options)


def test_a_batch_too_small_for_the_devices():
    with pytest.raises(ValueError, match=r"no plan uses all 8 devices with replicas=\(8,\).*the batch has 4\."):
        plan_with(devices=(1, 8), batch=4, replicas=(8,))
    with pytest.raises(ValueError, match="batch_size is 0"):
        plan_with(batch=0)


def test_what_does_not_fit_says_what_would():
    with pytest.raises(PlanError) as caught:
        plan_with(memory=3000)
    text = str(caught.value)
    assert "no plan fits on 4 x CPU" in text and "the largest block (layer." in text
    assert "what would make it fit:" in text and "devices on which a plan may use at least" in text
    with pytest.raises(PlanError, match=r"`memory_limit_gib` of at least"):
        plan_with(memory_limit_gib=3000 / GIB)


def test_a_remedy_really_helps():
    need = max(s.predicted_memory_bytes for s in plan_with(stages=1, microbatches=8, shard="none").stages)
    options = {
        "stages": 1,
        "recompute": "none",
        "microbatches": 8,
        "memory_limit_gib": 0.9 * need / GIB,
        "shard": "none",
    }
    with pytest.raises(PlanError) as caught:
        plan_with(**options)
    assert "`recompute: auto` instead of none" in str(caught.value)
    assert plan_with(**options | {"recompute": "auto"}).stages[0].recompute == "blocks"


def test_uneven_replicas_where_one_block_is_heavy():
    graph = make_graph([11, 12])
    costs = make_costs(graph, [10, 30], fixed_us=0.1)
    # Parameters of both blocks do not fit on one device: two stages, and the heavy one gets three of the four ranks.
    plan = find_plan(graph, costs, cluster(1, 4), 24, RanncConfig(stages=2))
    assert [s.replicas for s in plan.stages] == [1, 3]


def test_many_devices_are_planned_in_groups():
    graph = make_graph(list(range(11, 41)))
    costs = make_costs(graph, [10.0] * 30)
    plan = find_plan(graph, costs, cluster(16, 8), 512, RanncConfig())
    plan.check(graph, 128)
