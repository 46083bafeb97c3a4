"""The simulation against times worked out by hand, and against the schedules the engine runs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rannc_hf.engine.schedule.actions import ActionKind
from rannc_hf.engine.schedule.registry import compute_order
from rannc_hf.engine.schedule.registry import in_flight as engine_in_flight
from rannc_hf.partition.simulate import Edge, StageTimes, order, simulate
from rannc_hf.partition.stages import in_flight


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_have_the_known_bubble(schedule):
    """S stages and M microbatches take (M + S - 1) forwards and backwards where nothing else takes time."""
    for stages, microbatches in ((1, 4), (2, 4), (4, 8), (4, 2)):
        times = [StageTimes(1.0, 2.0, 0.0)] * stages
        edges = [Edge(s, s + 1, 0.0, 0.0) for s in range(stages - 1)]
        result = simulate(times, edges, schedule, microbatches)
        assert result.step_us == pytest.approx(3.0 * (microbatches + stages - 1))
        assert result.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_the_slowest_stage_decides():
    times = [StageTimes(1.0, 1.0, 0.0), StageTimes(5.0, 10.0, 0.0)]
    assert simulate(times, [Edge(0, 1, 0.0, 0.0)], "1f1b", 4).step_us == pytest.approx(1 + 4 * 15 + 1)


def test_tails_overlap_with_the_backwards_of_earlier_stages():
    edges = [Edge(0, 1, 0.0, 0.0)]
    # The last stage is done with its backward one backward before the first one.
    late = simulate([StageTimes(1.0, 2.0, 0.0), StageTimes(1.0, 2.0, 1.5)], edges, "1f1b", 1)
    early = simulate([StageTimes(1.0, 2.0, 1.5), StageTimes(1.0, 2.0, 0.0)], edges, "1f1b", 1)
    assert late.step_us == pytest.approx(6.0) and late.tail_us == pytest.approx(0.0)
    assert early.step_us == pytest.approx(7.5) and early.tail_us == pytest.approx(1.5)


def test_transfers_take_time_and_follow_each_other():
    times = [StageTimes(1.0, 1.0, 0.0)] * 2
    # Forward 1, transfer 10, forward 1, backward 1, transfer 10, backward 1.
    assert simulate(times, [Edge(0, 1, 10.0, 10.0)], "1f1b", 1).step_us == pytest.approx(24.0)
    # Two forwards leave one after the other: the second arrives at 21.
    assert simulate(times, [Edge(0, 1, 10.0, None)], "gpipe", 2).step_us == pytest.approx(24.0)


def test_skip_edges_are_waited_for():
    times = [StageTimes(1.0, 1.0, 0.0)] * 3
    chain = [Edge(0, 1, 0.0, 0.0), Edge(1, 2, 0.0, 0.0)]
    assert simulate(times, chain, "1f1b", 1).step_us == pytest.approx(6.0)
    assert simulate(times, [*chain, Edge(0, 2, 20.0, None)], "1f1b", 1).step_us == pytest.approx(25.0)
    assert simulate(times, [*chain, Edge(0, 2, 0.0, 20.0)], "1f1b", 1).step_us == pytest.approx(25.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 9), st.data())
def test_schedules_are_those_of_the_engine(schedule, stages, microbatches, data):
    stage = data.draw(st.integers(0, stages - 1))
    wanted = [(kind is ActionKind.BACKWARD, m) for kind, m in compute_order(schedule, stage, stages, microbatches)]
    assert order(schedule, stages, stage, microbatches) == wanted
    held = in_flight(schedule, stages, stage, microbatches)
    assert held == engine_in_flight(schedule, stage, stages, microbatches)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["gpipe", "1f1b"]), st.lists(st.floats(0.1, 9), min_size=1, max_size=5), st.integers(1, 6))
def test_a_step_is_no_faster_than_its_busiest_stage(schedule, forwards, microbatches):
    times = [StageTimes(f, 2 * f, 0.5) for f in forwards]
    edges = [Edge(s, s + 1, 0.1, 0.1) for s in range(len(times) - 1)]
    result = simulate(times, edges, schedule, microbatches)
    assert result.step_us >= max(result.computed_us)
    assert 0 <= result.bubble < 1
    assert result.step_us >= sum(3 * f for f in forwards)
