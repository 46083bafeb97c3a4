"""A plan that a person has edited trains exactly; one that was edited wrongly is refused by the name of the field."""

from __future__ import annotations

import json

import pytest

from rannc_hf.capture import capture
from rannc_hf.config import RanncConfig
from tests.parity.harness import EXACT, compare, even_plan, merge, on_ranks, plain, shards, train
from tests.parity.models import CASES

CASE = CASES["bert"]
RANKS, SAMPLES = 3, 12
STEPS = 2


@pytest.fixture(scope="module")
def text():
    """The JSON of a plan: stages of 1 and 2 replicas."""
    return even_plan(capture(CASE.model(), CASE.batch(SAMPLES)), (1, 2), 3, SAMPLES).to_json()


@pytest.fixture(scope="module")
def reference():
    return plain(CASE.model(), CASE.batch(SAMPLES), STEPS)


def trained(path):
    """Training on three ranks with the plan in a file."""
    parts = shards(CASE.batch(SAMPLES), RANKS)
    plans = []

    def run(wrapped, optimizer, rank):
        result = train(wrapped, optimizer, parts[rank], STEPS)
        plans.append(wrapped.plan)
        return result

    config = RanncConfig(plan=str(path), length_multiple=1)
    return merge(on_ranks(CASE.model(), RANKS, None, run, config)), plans[0]


def move_a_block(data):
    first, second = data["stages"]
    first["last_block"] += 1
    second["first_block"] += 1


def other_replicas(data):
    first, second = data["stages"]
    first["ranks"], second["ranks"] = [2, 0], [1]


def one_stage(data):
    data["stages"] = [{"first_block": 0, "last_block": data["stages"][1]["last_block"], "ranks": [0, 1, 2]}]


@pytest.mark.parametrize(
    "edit",
    [
        move_a_block,
        other_replicas,
        one_stage,
        lambda data: data.update(microbatches=5),
        lambda data: data.update(schedule="gpipe"),
        lambda data: data["stages"][0].update(recompute="blocks"),
    ],
    ids=["blocks", "replicas", "stages", "microbatches", "schedule", "recompute"],
)
def test_an_edited_plan_trains(text, reference, tmp_path, edit):
    data = json.loads(text)
    edit(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    result, plan = trained(path)
    compare(result, reference, EXACT)
    used = json.loads(plan.to_json())
    assert [s["ranks"] for s in used["stages"]] == [s["ranks"] for s in data["stages"]]
    assert [s["last_block"] for s in used["stages"]] == [s["last_block"] for s in data["stages"]]
    assert (used["microbatches"], used["schedule"]) == (data["microbatches"], data["schedule"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["stages"][1].update(ranks=[1, 3]), r"`stages\[1\].ranks` has rank 3"),
        (lambda data: data["stages"][0].update(blocks=3), r"plan.json: plan: `stages\[0\].blocks`"),
        (lambda data: data.update(microbatches="3"), r"plan.json: plan: `microbatches` .*not a whole number"),
        (lambda data: data.update(graph_hash="0"), "`graph_hash` is '0', but the model, its batch or its precision"),
    ],
)
def test_a_wrong_edit_is_refused_on_every_rank(text, tmp_path, edit, message):
    data = json.loads(text)
    edit(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    refused = []

    def run(wrapped, optimizer, rank):
        with pytest.raises(ValueError, match=message):
            wrapped(**shards(CASE.batch(SAMPLES), RANKS)[rank])
        refused.append(rank)

    on_ranks(CASE.model(), RANKS, None, run, RanncConfig(plan=str(path), length_multiple=1))
    assert sorted(refused) == [0, 1, 2]
