"""The search against brute force over every plan, and what it does with options and limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from graphs import make_costs, make_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import DEVICES, GIB, Link
from rannc_hf.cost.memory import state_bytes
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.dp import TOLERANCE, best_candidates
from rannc_hf.partition.search import PlanError, find_plan
from rannc_hf.partition.space import limits, microbatch_counts, replica_choices, search
from rannc_hf.partition.stages import Problem, StageModel

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def cluster(nodes, per_node, memory_bytes=10 * GIB, overlaps=True):
    device = replace(
        DEVICES["CPU"], memory_bytes=memory_bytes, reserved_bytes=0, memory_bandwidth=1e9, overlaps=overlaps
    )
    return Cluster(nodes, per_node, device, Link("intra", 1e-6, 1e9), Link("inter", 5e-6, 1e8))


# -- the estimate, written out once more from its definition ---------------------------------------------------------


def reference(problem, microbatches, schedule, stages):
    """Estimate in microseconds of stages [(first, last, replicas)], or None where they do not fit."""
    graph, costs, c = problem.graph, problem.costs, problem.cluster
    samples = -(-problem.batch_size // microbatches)
    total = slowest = 0.0
    rank = 0
    for index, (first, last, replicas) in enumerate(stages):
        share = -(-samples // replicas)
        blocks = graph.blocks[first : last + 1]
        cost = [costs.of(b, share) for b in blocks]
        forward, backward = sum(k.forward_us for k in cost), sum(k.backward_us for k in cost)
        names = {p for b in blocks for p in b.parameters}
        received = sum(
            graph.values[v].bytes_at(share)
            for v in {v for b in blocks for v in (*b.inputs, *b.preamble)}
            if v in graph.preamble or graph.producer(v) < first
        )
        held = microbatches if schedule == "gpipe" else min(microbatches, len(stages) - index)
        state = sum(state_bytes(graph, p) for p in names)
        extra = max(k.workspace_bytes for k in cost) + received
        none = state + held * (received + sum(k.saved_bytes for k in cost)) + extra
        again = state + held * (received + sum(k.output_bytes for k in cost)) + extra + max(k.saved_bytes for k in cost)
        limit = problem.memory_bytes
        if none <= limit and problem.config.recompute != "blocks":
            time = forward + backward
        elif again <= limit and problem.config.recompute != "none":
            time = 2 * forward + backward
        else:
            return None
        node = [r // c.devices_per_node for r in range(c.size)]
        spans = node[rank] != node[rank + replicas - 1]

        def moved(boundary, inside, outside, spans=spans, share=share, node=node):
            crossing = [
                v
                for b in graph.blocks[:boundary]
                for v in b.outputs
                if any(v in later.inputs for later in graph.blocks[boundary:])
            ]
            if not crossing:
                return 0.0
            far = spans or node[inside] != node[outside]
            size = sum(graph.values[v].bytes_at(samples if far else share) for v in crossing)
            return (c.inter if far else c.intra).time_us(size)

        into = moved(first, rank, rank - 1) if index else 0.0
        out = moved(last + 1, rank + replicas - 1, rank + replicas) if index + 1 < len(stages) else 0.0
        trained = sum(graph.parameters[p].numel for p in names)
        link = c.inter if spans else c.intra
        reduce = 0.0
        if replicas > 1:
            messages = 2 * (replicas - 1) * link.latency_s * len(blocks)
            reduce = (messages + 2 * (replicas - 1) / replicas * 4 * trained / link.bandwidth) * 1e6
        hidden = backward * (1 - 1 / len(blocks)) if c.device.overlaps else 0.0
        optimizer = trained * 44 / c.device.memory_bandwidth * 1e6 + len(names) * 2.5 * c.device.kernel_us
        tail = max(reduce / len(blocks), reduce - hidden) + optimizer
        each = max(time, into + out) if schedule == "gpipe" else time + into + out
        total += time + 2 * into
        slowest = max(slowest, (microbatches - 1) * each + tail)
        rank += replicas
    return total + slowest


def all_stages(blocks, devices, most_replicas):
    for count in range(1, min(blocks, devices) + 1):
        for cuts in itertools.combinations(range(1, blocks), count - 1):
            bounds = [0, *cuts, blocks]
            for replicas in itertools.product(range(1, most_replicas + 1), repeat=count):
                if sum(replicas) == devices:
                    yield [(a, b - 1, r) for a, b, r in zip(bounds, bounds[1:], replicas)]


@st.composite
def problems(draw):
    n = draw(st.integers(2, 5))
    widths = draw(st.lists(st.integers(1, 40), min_size=n, max_size=n, unique=True))
    skips = draw(st.lists(st.tuples(st.integers(0, n - 3), st.integers(2, n - 1)), max_size=2)) if n > 2 else []
    skips = [(p, c) for p, c in set(skips) if c > p + 1]
    tied = [(0, n - 1)] if draw(st.booleans()) else []
    if tied:
        widths[-1] = widths[0]
    graph = make_graph(widths, skips=skips, tied=tied)
    times = draw(st.lists(st.floats(0.5, 50), min_size=n, max_size=n))
    costs = make_costs(graph, times, saved=draw(st.sampled_from([100, 2000])))
    nodes, per_node = draw(st.sampled_from([(1, 2), (1, 4), (2, 2), (1, 3), (2, 3)]))
    memory = draw(st.sampled_from([10 * GIB, 60_000, 30_000, 20_000]))
    batch = draw(st.sampled_from([4, 6, 8, 12]))
    config = RanncConfig(recompute=draw(st.sampled_from(["auto", "none", "blocks"])))
    return Problem(graph, costs, cluster(nodes, per_node, memory, draw(st.booleans())), batch, config)


@SETTINGS
@given(problems(), st.sampled_from(["1f1b", "gpipe"]))
def test_search_equals_brute_force(problem, schedule):
    blocks, devices = problem.segments.count, problem.cluster.size
    least = {}
    for microbatches in microbatch_counts(problem):
        most = min(devices, problem.batch_size // microbatches)
        estimates = [
            e
            for stages in all_stages(blocks, devices, most)
            if (e := reference(problem, microbatches, schedule, stages)) is not None
        ]
        expected = min(estimates, default=None)
        model = StageModel(problem, microbatches, replica_choices(problem, microbatches))
        found = best_candidates(model, schedule, limits(problem), float("inf"), tolerance=0)
        if expected is None:
            assert not found
            continue
        assert found[0].estimate_us == pytest.approx(expected, rel=1e-9)
        # With a tight bound from the start, what cannot be better is dropped early, but not the best plan.
        tight = best_candidates(model, schedule, limits(problem), expected * (1 + 1e-6), tolerance=0)
        assert tight and tight[0].estimate_us == pytest.approx(expected, rel=1e-9)
        for c in found:
            assert c.estimate_us == pytest.approx(reference(problem, microbatches, schedule, c.stages), rel=1e-9)
        least[microbatches] = expected
    config = RanncConfig(recompute=problem.config.recompute, schedule=schedule)
    candidates = search(replace(problem, config=config), {})
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
    assert all(s.predicted_memory_bytes <= problem.memory_bytes for s in plan.stages)
    assert [r for s in plan.stages for r in s.ranks] == list(range(problem.cluster.size))
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
    roomy = plan_with(stages=1, microbatches=4)
    need = roomy.stages[0].predicted_memory_bytes
    tight = plan_with(stages=1, microbatches=4, memory_limit_gib=0.93 * need / GIB)
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
        ({"microbatches": 32, "stages": 1}, r"no plan uses all 4 devices with stages=1, microbatches=32"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plan_with(**options)


def test_a_batch_too_small_for_the_devices():
    with pytest.raises(ValueError, match=r"no plan uses all 8 devices: the model has 6 blocks.*the batch has 1\."):
        plan_with(devices=(1, 8), batch=1)
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
    need = max(s.predicted_memory_bytes for s in plan_with(stages=1, microbatches=8).stages)
    options = {"stages": 1, "recompute": "none", "microbatches": 8, "memory_limit_gib": 0.9 * need / GIB}
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
