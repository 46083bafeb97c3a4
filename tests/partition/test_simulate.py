"""The simulation against times worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rannc_hf.partition.simulate import Edge, StageTimes, TiedReduce, simulate


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_have_the_known_bubble(schedule):
    """S stages and M microbatches take (M + S - 1) forwards and backwards where nothing else takes time."""
    for stages, microbatches in ((1, 4), (2, 4), (4, 8), (4, 2)):
        times = [StageTimes(1.0, 2.0)] * stages
        edges = [Edge(s, s + 1, 0.0, 0.0) for s in range(stages - 1)]
        result = simulate(times, edges, schedule, microbatches)
        assert result.step_us == pytest.approx(3.0 * (microbatches + stages - 1))
        assert result.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_the_slowest_stage_decides():
    times = [StageTimes(1.0, 1.0), StageTimes(5.0, 10.0)]
    assert simulate(times, [Edge(0, 1, 0.0, 0.0)], "1f1b", 4).step_us == pytest.approx(1 + 4 * 15 + 1)


def test_tails_overlap_with_the_backwards_of_earlier_stages():
    edges = [Edge(0, 1, 0.0, 0.0)]
    # The last stage is done with its backward one backward before the first one.
    late = simulate([StageTimes(1.0, 2.0), StageTimes(1.0, 2.0, optimizer=1.5)], edges, "1f1b", 1)
    early = simulate([StageTimes(1.0, 2.0, optimizer=1.5), StageTimes(1.0, 2.0)], edges, "1f1b", 1)
    assert late.step_us == pytest.approx(6.0) and late.tail_us == pytest.approx(0.0)
    assert early.step_us == pytest.approx(7.5) and early.tail_us == pytest.approx(1.5)


def test_a_step_begins_when_parameters_have_arrived():
    edges = [Edge(0, 1, 0.0, 0.0)]
    # The second stage waits for the first one's forward anyway.
    assert simulate([StageTimes(1.0, 2.0, head=5.0), StageTimes(1.0, 2.0)], edges, "1f1b", 1).step_us == 11.0
    assert simulate([StageTimes(1.0, 2.0), StageTimes(1.0, 2.0, head=1.5)], edges, "1f1b", 1).step_us == 6.5


def test_tied_weights_are_reduced_when_all_their_stages_are_there():
    times = [
        StageTimes(1.0, 2.0, exposed=1.0, optimizer=0.5),
        StageTimes(1.0, 2.0),
        StageTimes(1.0, 2.0, optimizer=9.0),
    ]
    edges = [Edge(0, 1, 0.0, 0.0), Edge(1, 2, 0.0, 0.0)]
    # Last backwards end at 9, 7 and 5; the tied weight waits for the first stage's other gradients.
    alone = simulate(times, edges, "1f1b", 1)
    tied = simulate(times, edges, "1f1b", 1, [TiedReduce((0, 2), 3.0)])
    assert alone.step_us == 14.0
    assert tied.step_us == 9.0 + 1.0 + 3.0 + 9.0


def test_transfers_take_time_and_follow_each_other():
    times = [StageTimes(1.0, 1.0)] * 2
    # Forward 1, transfer 10, forward 1, backward 1, transfer 10, backward 1.
    assert simulate(times, [Edge(0, 1, 10.0, 10.0)], "1f1b", 1).step_us == pytest.approx(24.0)
    # Two forwards leave one after the other: the second arrives at 21.
    assert simulate(times, [Edge(0, 1, 10.0, None)], "gpipe", 2).step_us == pytest.approx(24.0)


def test_skip_edges_are_waited_for():
    times = [StageTimes(1.0, 1.0)] * 3
    chain = [Edge(0, 1, 0.0, 0.0), Edge(1, 2, 0.0, 0.0)]
    assert simulate(times, chain, "1f1b", 1).step_us == pytest.approx(6.0)
    assert simulate(times, [*chain, Edge(0, 2, 20.0, None)], "1f1b", 1).step_us == pytest.approx(25.0)
    assert simulate(times, [*chain, Edge(0, 2, 0.0, 20.0)], "1f1b", 1).step_us == pytest.approx(25.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["gpipe", "1f1b"]), st.lists(st.floats(0.1, 9), min_size=1, max_size=5), st.integers(1, 6))
def test_a_step_is_no_faster_than_its_busiest_stage(schedule, forwards, microbatches):
    times = [StageTimes(f, 2 * f, 0.0, 0.25, 0.25) for f in forwards]
    edges = [Edge(s, s + 1, 0.1, 0.1) for s in range(len(times) - 1)]
    result = simulate(times, edges, schedule, microbatches)
    assert result.step_us >= max(result.computed_us)
    assert 0 <= result.bubble < 1
    assert result.step_us >= sum(3 * f for f in forwards)


def interleaved(groups: int, laps: int, microbatches: int, forward: float, backward: float) -> float:
    """The step of equal stages without transfers that together compute as much as `groups` stages do."""
    times = [StageTimes(forward / laps, backward / laps)] * (groups * laps)
    edges = [Edge(s, s + 1, 0.0, 0.0) for s in range(groups * laps - 1)]
    return simulate(times, edges, "interleaved", microbatches, groups=groups).step_us


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4), st.floats(0.5, 4.0))
def test_interleaved_divides_the_bubble_of_full_rounds_by_its_laps(groups, laps, rounds, backward):
    microbatches = rounds * groups
    wanted = (1.0 + backward) * (microbatches + (groups - 1) / laps)
    assert interleaved(groups, laps, microbatches, 1.0, backward) == pytest.approx(wanted)


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 14))
def test_interleaved_takes_no_longer_than_with_a_full_last_round(groups, laps, microbatches):
    full = -(-microbatches // groups) * groups
    assert interleaved(groups, laps, microbatches, 1.0, 2.0) <= interleaved(groups, laps, full, 1.0, 2.0) * (1 + 1e-9)


def test_gradients_of_a_stage_are_reduced_while_others_of_its_rank_compute():
    # Ranks 0 and 1 run stages 0, 2 and 1, 3; the last backwards end at 8 for stage 2 and at 12 for stage 0.
    def step(exposed: tuple[float, ...]) -> float:
        times = [StageTimes(1.0, 2.0, exposed=e) for e in exposed]
        edges = [Edge(s, s + 1, 0.0, 0.0) for s in range(3)]
        return simulate(times, edges, "interleaved", 1, groups=2).step_us

    assert step((0.0, 0.0, 0.0, 0.0)) == 12.0
    assert step((0.0, 0.0, 3.5, 0.0)) == 12.0
    assert step((1.0, 0.0, 5.0, 0.0)) == 8.0 + 5.0 + 1.0
