from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rannc_hf.engine.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    compute_order,
    in_flight,
    lower,
    lower_backward,
    lower_forward,
    validate,
)


def chain(stages: int) -> dict[tuple[int, int], bool]:
    return {(s, s + 1): True for s in range(stages - 1)}


def listed(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


def printed(actions: list[Action]) -> str:
    return " ".join(map(str, actions))


@st.composite
def pipelines(draw) -> tuple[str, int, int, dict[tuple[int, int], bool]]:
    stages = draw(st.integers(1, 7))
    edges = chain(stages)
    for producer in range(stages):
        for consumer in range(producer + 1, stages):
            kind = draw(st.sampled_from(["keep", "gradient", "plain"]))
            if kind != "keep":
                edges[producer, consumer] = kind == "gradient"
    return draw(st.sampled_from(sorted(SCHEDULES))), stages, draw(st.integers(1, 9)), edges


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(ActionKind.FORWARD, 2, 0), "2F0"),
        (Action(ActionKind.BACKWARD, 12, 34), "12B34"),
        (Action(ActionKind.RECV_ACT, 2, 0, 1), "2RA0<1"),
        (Action(ActionKind.SEND_ACT, 2, 0, 3), "2SA0>3"),
        (Action(ActionKind.RECV_GRAD, 2, 0, 3), "2RG0<3"),
        (Action(ActionKind.SEND_GRAD, 2, 10, 11), "2SG10>11"),
        (Action(ActionKind.REDUCE_GRAD, 2), "2REDUCE"),
    ],
)
def test_actions_print_and_parse(action, text):
    assert str(action) == text
    assert Action.parse(text) == action


@pytest.mark.parametrize("text", ["", "2F", "F0", "2F0<1", "2RA0>1", "2SA0<3", "2REDUCE0", "2X0", "2RA0", "2F0 "])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ValueError, match="is not an action"):
        Action.parse(text)


def test_orders():
    def text(schedule, stage):
        return " ".join(f"{a.kind.value}{a.microbatch}" for a in compute_order(schedule, stage, 3, 4))

    assert text("gpipe", 1) == "F0 F1 F2 F3 B0 B1 B2 B3"
    assert text("1f1b", 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text("1f1b", 1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert text("1f1b", 2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_unknown_schedule_lists_the_known_ones():
    for call in (lambda: lower("2f2b", 2, 2, chain(2)), lambda: in_flight("2f2b", 0, 2, 2)):
        with pytest.raises(ValueError, match="'2f2b'; known are 1f1b, gpipe, interleaved"):
            call()


def test_in_flight():
    assert [in_flight("gpipe", s, 4, 9) for s in range(4)] == [9, 9, 9, 9]
    assert [in_flight("1f1b", s, 4, 9) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight("1f1b", s, 4, 2) for s in range(4)] == [2, 2, 2, 1]


def test_lowering_posts_receives_before_the_compute_they_overlap():
    lists = lower("1f1b", 3, 2, {(0, 1): True, (1, 2): True, (0, 2): False})
    assert [printed(own) for own in lists] == [
        "0F0 0SA0>1 0SA0>2 0RG0<1 0F1 0SA1>1 0SA1>2 0RG1<1 0B0 0B1 0REDUCE",
        "1RA0<0 1RA1<0 1F0 1SA0>2 1RG0<2 1F1 1SA1>2 1RG1<2 1B0 1SG0>0 1B1 1SG1>0 1REDUCE",
        "2RA0<1 2RA0<0 2F0 2RA1<1 2RA1<0 2B0 2SG0>1 2F1 2B1 2SG1>1 2REDUCE",
    ]


def test_lowering_for_evaluation_has_forwards_only():
    edges = {(0, 1): True, (1, 2): True, (0, 2): True}
    lists = lower_forward(3, 2, edges)
    assert printed(lists[0]) == "0F0 0SA0>1 0SA0>2 0F1 0SA1>1 0SA1>2"
    assert printed(lists[2]) == "2RA0<1 2RA0<0 2RA1<1 2RA1<0 2F0 2F1"
    validate(lists, edges, 2, training=False)
    with pytest.raises(ValueError, match="stage 0: no backward of some microbatches: 0B0, 0B1"):
        validate(lists, edges, 2)


@settings(deadline=None)
@given(pipelines())
def test_every_lowered_schedule_is_valid(pipeline):
    schedule, stages, microbatches, edges = pipeline
    validate(lower(schedule, stages, microbatches, edges), edges, microbatches)
    forwards = lower_forward(stages, microbatches, edges)
    validate(forwards, edges, microbatches, training=False)
    completed = [[*a, *b] for a, b in zip(forwards, lower_backward(stages, microbatches, edges))]
    validate(completed, edges, microbatches)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 11), st.data())
def test_interleaved_lists_are_valid_for_any_number_of_microbatches(groups, laps, microbatches, data):
    stages = groups * laps
    edges = chain(stages)
    for producer in range(stages):
        for consumer in range(producer + 1, stages):
            kind = data.draw(st.sampled_from(["keep", "keep", "gradient", "plain"]))
            if kind != "keep":
                edges[producer, consumer] = kind == "gradient"
    held = [range(group, stages, groups) for group in range(groups)]
    validate(lower("interleaved", stages, microbatches, edges, groups), edges, microbatches, True, held)
    forwards = lower_forward(stages, microbatches, edges, groups)
    validate(forwards, edges, microbatches, False, held)
    completed = [[*a, *b] for a, b in zip(forwards, lower_backward(stages, microbatches, edges, groups))]
    validate(completed, edges, microbatches, True, held)


def test_interleaved_orders():
    def text(group, microbatches):
        return " ".join(map(str, compute_order("interleaved", group, 4, microbatches, 2)))

    assert text(0, 2) == "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1"
    assert text(1, 2) == "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"
    assert text(1, 3) == "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1B1 3F2 3B2 1B2"
    assert [in_flight("interleaved", s, 4, 8, 2) for s in range(4)] == [4, 3, 2, 1]


def test_a_circular_wait_within_a_rank_is_named():
    # Rank 0 wants its second stage before its first.
    lists = [listed("2RA0<1 2F0 0F0 0SA0>1"), listed("1RA0<0 1F0 1SA0>2")]
    with pytest.raises(ValueError) as error:
        validate(lists, chain(3), 1, False, [[0, 2], [1]])
    assert "stages 0, 2 are stuck at 2F0: waits for 2RA0<1 (message 0 of channel 1>2), not sent yet" in str(error.value)


@settings(deadline=None)
@given(pipelines(), st.data())
def test_a_lost_action_is_noticed(pipeline, data):
    schedule, stages, microbatches, edges = pipeline
    lists = lower(schedule, stages, microbatches, edges)
    own = lists[data.draw(st.integers(0, stages - 1))]
    del own[data.draw(st.integers(0, len(own) - 1))]
    with pytest.raises(ValueError):
        validate(lists, edges, microbatches)


def test_edges_must_lead_forward():
    with pytest.raises(ValueError, match="from stage 1 to stage 1 does not lead forward within 2 stages"):
        lower("1f1b", 2, 1, {(1, 1): True})
    with pytest.raises(ValueError, match="from stage 1 to stage 2 does not lead forward"):
        validate([[], []], {(1, 2): True}, 0)


def test_circular_wait_names_what_each_stage_is_stuck_on():
    # The last stage wants all forwards first, the first stage wants a gradient after one.
    lists = [
        listed("0F0 0SA0>1 0RG0<1 0B0 0F1 0SA1>1 0RG1<1 0B1 0REDUCE"),
        listed("1RA0<0 1F0 1RA1<0 1F1 1B0 1SG0>0 1B1 1SG1>0 1REDUCE"),
    ]
    with pytest.raises(ValueError) as error:
        validate(lists, chain(2), 2)
    assert "stage 0 is stuck at 0B0: waits for 0RG0<1 (message 0 of channel 0<1), not sent yet" in str(error.value)
    assert "stage 1 is stuck at 1F1: waits for 1RA1<0 (message 1 of channel 0>1), not sent yet" in str(error.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "0F1 0SA1>1 0F0 0SA0>1 0RG0<1 0B0 0RG1<1 0B1 0REDUCE",
            "1RA0<0 1F0 1RA1<0 1F1 1B0 1SG0>0 1B1 1SG1>0 1REDUCE",
            "channel 0>1: message 0 is sent by 0SA1>1 but received by 1RA0<0",
        ),
        (
            "0F0 0SA0>1 0F1 0SA1>1 0SA1>1 0RG0<1 0B0 0RG1<1 0B1 0REDUCE",
            "1RA0<0 1F0 1RA1<0 1F1 1B0 1SG0>0 1B1 1SG1>0 1REDUCE",
            "channel 0>1: no matching receive for 0SA1>1",
        ),
        ("0B0 0REDUCE", "1REDUCE", "stage 0: 0B0 comes before its forward"),
        ("0SA0>1 0F0 0REDUCE", "1REDUCE", "0SA0>1 comes before 0F0, which makes what it sends"),
        ("0F0 0F0", "1REDUCE", "0F0 occurs twice"),
        ("0F0 0B0", "1REDUCE", "0B0 has no receive before it from stage 1"),
        ("0F0 0F1 0RG0<1 0B0 0RG1<1 0B1", "1REDUCE", "stage 0: a training step must end with 0REDUCE"),
        ("0REDUCE 0F0", "1REDUCE", "0REDUCE must be the last action"),
        ("0F0 0SA0>2 0REDUCE", "1REDUCE", "0SA0>2 uses an edge with stage 2 that the plan does not have"),
        ("1F0", "1REDUCE", "stage 0: 1F0 is an action of stage 1"),
        ("0F7", "1REDUCE", "0F7 is for a microbatch that does not exist"),
    ],
)
def test_mistakes_are_named(first, second, message):
    with pytest.raises(ValueError) as error:
        validate([listed(first), listed(second)], chain(2), 2)
    assert message in str(error.value)


def test_missing_send_is_reported_with_who_has_finished():
    lists = [listed("0F0 0REDUCE"), listed("1RA0<0 1F0 1REDUCE")]
    lists[0].insert(1, Action(ActionKind.BACKWARD, 0, 0))
    lists[1].insert(2, Action(ActionKind.BACKWARD, 1, 0))
    with pytest.raises(ValueError, match="stage 0 has finished\n  stage 1 is stuck at 1F0: waits for 1RA0<0"):
        validate(lists, {(0, 1): False}, 1)


def test_a_large_pipeline_is_checked():
    edges = chain(16) | {(0, 15): True}
    validate(lower("1f1b", 16, 200, edges), edges, 200)
