"""Plans as JSON, and that each wrong edit names the field."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from graphs import make_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from rannc_hf.partition.plan import Plan, RunnerUp, StagePlan

GRAPH = make_graph([8] * 6)
PLAN = Plan(
    stages=(
        StagePlan(0, 1, (0,), "none", "none", 10.0, 20.5, 1000),
        StagePlan(2, 4, (1, 2, 3), "blocks", "none", 11.0, 31.0, 2000),
        StagePlan(5, 5, (4,), "none"),
    ),
    batch_size=32,
    microbatches=8,
    schedule="1f1b",
    graph_hash=GRAPH.structural_hash,
    step_time_us=1234.5,
    why="because",
    runners_up=(RunnerUp((3, 3), (2, 3), 4, "gpipe", ("none", "none"), 2000.0, "62.0% slower: it waits"),),
)


def edited(change):
    data = json.loads(PLAN.to_json())
    change(data)
    return json.dumps(data)


def test_round_trip(tmp_path):
    assert Plan.from_json(PLAN.to_json()) == PLAN
    PLAN.save(tmp_path / "made" / "plan.json")
    assert Plan.load(tmp_path / "made" / "plan.json") == PLAN
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["plan.json"]
    assert len(PLAN.to_json().splitlines()) < 30, "a stage is a line, so that plans can be compared"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 512),
    st.floats(0, 1e12),
    st.sampled_from(["gpipe", "1f1b"]),
    st.text(max_size=20),
)
def test_round_trip_of_any_plan(replicas, batch, time, schedule, why):
    stages = tuple(
        StagePlan(i, i, tuple(range(r)), "none", "none", time, time / 3, batch) for i, r in enumerate(replicas)
    )
    plan = Plan(stages, batch, 1, schedule, "hash", time, why)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_needs_no_predictions():
    def bare(data):
        del data["step_time_us"], data["why"], data["runners_up"]
        data["stages"] = [{"first_block": 0, "last_block": 5, "ranks": [0, 1]}]

    plan = Plan.from_json(edited(bare))
    assert plan.stages == (StagePlan(0, 5, (0, 1)),)
    plan.check(GRAPH, 2)


def test_the_plan_passes_its_own_check():
    PLAN.check(GRAPH, 5)
    text = str(PLAN)
    assert "3 stages on 5 ranks" in text and "1-3" in text and "because" in text


def set_stage(index, **values):
    return lambda data: data["stages"][index].update(values)


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (lambda d: d.update(format=7), "format", "reads format 1"),
        (lambda d: d.pop("microbatches"), "microbatches", "is missing"),
        (lambda d: d.update(micro_batches=2), "micro_batches", "did you mean `microbatches`"),
        (lambda d: d.update(batch_size="32"), "batch_size", "not a whole number"),
        (lambda d: d.update(batch_size=True), "batch_size", "not a whole number"),
        (lambda d: d.update(schedule=1), "schedule", "not a string"),
        (lambda d: d.update(stages={}), "stages", "not a list"),
        (lambda d: d.update(stages=[3]), "stages[0]", "not an object"),
        (set_stage(1, ranks=4), "stages[1].ranks", "not a list"),
        (set_stage(1, ranks=[1, "2"]), "stages[1].ranks[1]", "not a whole number"),
        (set_stage(2, rank=[4]), "stages[2].rank", "did you mean `ranks`"),
        (set_stage(0, predicted_forward_us="fast"), "stages[0].predicted_forward_us", "not a number"),
        (lambda d: d["stages"][1].pop("last_block"), "stages[1].last_block", "is missing"),
        (lambda d: d["runners_up"][0].update(reason=3), "runners_up[0].reason", "not a string"),
    ],
)
def test_what_cannot_be_read_names_the_field(change, field, problem):
    with pytest.raises(ValueError, match=rf"plan: `{re.escape(field)}` .*{problem}"):
        Plan.from_json(edited(change))


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (lambda d: d.update(graph_hash="other"), "graph_hash", "make a new plan for this model"),
        (lambda d: d.update(schedule="zero-bubble"), "schedule", "not one of gpipe, 1f1b"),
        (lambda d: d.update(stages=[]), "stages", "is empty"),
        (set_stage(1, recompute="all"), "stages[1].recompute", "not one of none, blocks"),
        (set_stage(0, first_block=1), "stages[0].first_block", "the first block is 0"),
        (set_stage(1, first_block=3), "stages[1].first_block", r"stages\[0\] ends with 1: it must be 2"),
        (set_stage(1, first_block=1), "stages[1].first_block", "must be 2"),
        (set_stage(1, last_block=1), "stages[1].last_block", "not between first_block 2 and 5"),
        (set_stage(2, last_block=6), "stages[2].last_block", "the last block of the model"),
        (lambda d: d["stages"].pop(), "stages[1].last_block", "the model's last block is 5"),
        (set_stage(1, ranks=[]), "stages[1].ranks", "at least one rank"),
        (set_stage(1, ranks=[1, 2, 5]), "stages[1].ranks", "has rank 5, but there are 5 processes"),
        (set_stage(2, ranks=[-1]), "stages[2].ranks", "has rank -1"),
        (set_stage(2, ranks=[3]), "stages[2].ranks", r"has rank 3, which stages\[1\] has already"),
        (set_stage(1, ranks=[1, 2]), "stages[*].ranks", "use 4 ranks, but there are 5 processes: no stage has 3"),
        (lambda d: d.update(microbatches=0), "microbatches", "not between 1 and batch_size 32"),
        (lambda d: d.update(microbatches=33), "microbatches", "not between 1 and batch_size 32"),
        (lambda d: d.update(microbatches=16), "microbatches", r"2 samples .* but stages\[1\] has 3 .*use at most 10"),
    ],
)
def test_what_does_not_match_names_the_field(change, field, problem):
    plan = Plan.from_json(edited(change))
    with pytest.raises(ValueError, match=rf"plan: `{re.escape(field)}` .*{problem}") as caught:
        plan.check(GRAPH, 5)
    assert caught.value.field == field


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read plan '.*absent\.json': No such file"):
        Plan.load(tmp_path / "absent.json")
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json: plan is not valid JSON"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"plan\.json: plan: `plan` is \[\], not an object"):
        Plan.load(path)


def test_a_plan_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.microbatches = 3  # type: ignore[misc]
    assert hash(PLAN) == hash(Plan.from_json(PLAN.to_json()))


def interleaved(*ranks: tuple[int, ...]) -> Plan:
    stages = tuple(StagePlan(i, i, own) for i, own in enumerate(ranks))
    return Plan(stages, 32, 8, "interleaved", "hash")


def test_interleaved_stages_share_ranks():
    plan = interleaved((0,), (1, 2), (0,), (1, 2), (0,), (1, 2))
    plan.check_shape(6, 3)
    assert plan.world_size == 3
    assert plan.groups == ((0, 2, 4), (1, 3, 5))
    assert PLAN.groups == ((0,), (1,), (2,))
    assert "6 stages on 3 ranks" in str(plan)


@pytest.mark.parametrize(
    ("ranks", "field", "problem"),
    [
        (((0,), (1,)), "stages[*].ranks", "give each stage ranks of its own, but under"),
        (((0,), (0,)), "stages[*].ranks", "give neighbours the same ranks, but under"),
        (((0,), (1,), (0,)), "stages", 'are 3, but under the schedule "interleaved" they are a multiple of the 2'),
        (((0,), (1,), (0,), (2,)), "stages[3].ranks", "they must be those of stages[1], [1]"),
        (((0, 1), (2,), (0, 1), (1,)), "stages[3].ranks", "must be those of stages[1], [2]"),
        (((0, 1), (1,), (0, 1), (1,)), "stages[1].ranks", "has rank 1, which stages[0] has already"),
    ],
)
def test_wrong_interleaved_ranks_are_named(ranks, field, problem):
    plan = interleaved(*ranks)
    with pytest.raises(ValueError, match=re.escape(f"`{field}`")) as error:
        plan.check_shape(len(ranks), plan.world_size)
    assert problem in str(error.value)


def test_shared_ranks_need_the_interleaved_schedule():
    plan = dataclasses.replace(interleaved((0,), (1,), (0,), (1,)), schedule="1f1b")
    with pytest.raises(ValueError, match=re.escape("stages[2].ranks` has rank 0, which stages[0] has already")):
        plan.check_shape(4, 2)
