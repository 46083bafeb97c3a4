"""The plan that training chooses by itself: from which costs, and of which graph."""

from __future__ import annotations

import json

import pytest
import torch

from rannc_hf.capture import capture
from rannc_hf.config import RanncConfig
from rannc_hf.cost.choose import costs_of, graph_to_run
from rannc_hf.engine import RanncModel
from rannc_hf.engine import planning as module
from rannc_hf.engine.planning import find_plan_here
from rannc_hf.engine.transport import LocalWorld
from tests.parity.harness import CPU
from tests.parity.models import CASES

CASE = CASES["bert"]
BATCH = CASE.batch(8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


@pytest.fixture(scope="module")
def graph():
    return capture(CASE.model(), BATCH)


def test_computed_costs_need_no_cache(graph, cache):
    plan = find_plan_here(graph, RanncConfig(), 8, CPU, 2)
    plan.check(graph, 2)
    assert not cache.exists(), "a CPU is not measured unless asked to"


def test_measured_costs_come_from_the_cache_the_second_time(graph, cache, monkeypatch):
    config = RanncConfig(costs="measured")
    first = find_plan_here(graph, config, 8, CPU, 2, ("attention_mask",))
    entries = {p: json.loads(p.read_text()) for p in cache.rglob("*.json")}
    running = graph_to_run(graph, ("attention_mask",))
    assert {e["block"] for e in entries.values()} == {b.key for b in running.blocks}
    monkeypatch.setattr("rannc_hf.cost.measure.block_function", None)
    second = find_plan_here(graph, config, 8, CPU, 2, ("attention_mask",))
    assert second == first and first.graph_hash == graph.structural_hash
    second.check(graph, 2)


def test_unpadded_batches_are_planned_without_masks(graph):
    running = graph_to_run(graph, ("attention_mask",))
    assert graph_to_run(graph, ()) is graph
    assert [b.key for b in running.blocks] != [b.key for b in graph.blocks]
    assert running.structural_hash == graph.structural_hash
    costs, _ = costs_of(running, module.Cluster.here(1, 1, "cpu").device, CPU, 4, "analytic")
    assert set(costs.points) == {b.key for b in running.blocks}
    vit = capture(CASES["vit"].model(), CASES["vit"].batch_as(4))
    assert graph_to_run(vit, ()) is not vit, "its masks hide nothing in any batch"
    resnet = capture(CASES["resnet"].model(), CASES["resnet"].batch_as(4))
    assert graph_to_run(resnet, ()) is resnet, "there is nothing to leave out"


@pytest.mark.parametrize("padded", [True, False])
def test_the_first_batch_says_whether_it_is_padded(monkeypatch, padded):
    seen = []
    original = module.find_plan_here
    monkeypatch.setattr(
        "rannc_hf.engine.model.find_plan_here", lambda *arguments: seen.append(arguments[-1]) or original(*arguments)
    )
    batch = BATCH if padded else {**BATCH, "attention_mask": torch.ones_like(BATCH["attention_mask"])}

    def body(transport):
        model = RanncModel(CASE.model(), RanncConfig(length_multiple=1), device=CPU, transport=transport)
        model(**batch)

    LocalWorld(1).run(body)
    assert seen == [frozenset() if padded else frozenset({"attention_mask"})]
