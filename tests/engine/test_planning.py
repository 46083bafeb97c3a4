"""The plan that training chooses by itself: from which costs, and of which graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rannc_hf.capture import capture
from rannc_hf.capture.passes.sparse_head import sparse_head
from rannc_hf.config import RanncConfig
from rannc_hf.cost.choose import compiled_costs, costs_of, graph_to_run, labelled_share
from rannc_hf.cost.table import BlockCost, CostTable
from rannc_hf.engine import RanncModel
from rannc_hf.engine import planning as module
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.executor import Executor
from rannc_hf.engine.planning import find_plan_here
from rannc_hf.engine.transport import LocalWorld
from tests.parity.harness import CPU
from tests.parity.models import CASES

CASE = CASES["bert"]
BATCH = CASE.batch(8)


def gathered(batch=BATCH, unpadded=()):
    """A batch as the engine gathers it from two ranks."""
    samples = next(iter(batch.values())).shape[0]
    shards = (samples // 2, samples - samples // 2)
    return GlobalBatch(dict(batch), frozenset(batch), shards, frozenset(unpadded), batch)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


@pytest.fixture(scope="module")
def graph():
    return capture(CASE.model(), BATCH)


def test_computed_costs_need_no_cache(graph, cache):
    plan = find_plan_here(graph, RanncConfig(), gathered(), CPU, 2)
    plan.check(graph, 2)
    assert not cache.exists(), "a CPU is not measured unless asked to"


def test_measured_costs_come_from_the_cache_the_second_time(graph, cache, monkeypatch):
    config = RanncConfig(costs="measured")
    first = find_plan_here(graph, config, gathered(unpadded=["attention_mask"]), CPU, 2)
    entries = {p: json.loads(p.read_text()) for p in cache.rglob("*.json")}
    running = graph_to_run(graph, ("attention_mask",), lambda head: labelled_share(graph, BATCH, 8, head))
    assert {e["block"] for e in entries.values()} == {b.key for b in running.blocks}
    monkeypatch.setattr("rannc_hf.cost.measure.block_function", None)
    second = find_plan_here(graph, config, gathered(unpadded=["attention_mask"]), CPU, 2)
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

    def spy(graph, config, batch, *rest):
        seen.append(batch.unpadded)
        return original(graph, config, batch, *rest)

    monkeypatch.setattr("rannc_hf.engine.model.find_plan_here", spy)
    batch = BATCH if padded else {**BATCH, "attention_mask": torch.ones_like(BATCH["attention_mask"])}

    def body(transport):
        model = RanncModel(CASE.model(), RanncConfig(length_multiple=1), device=CPU, transport=transport)
        model(**batch)

    LocalWorld(1).run(body)
    assert seen == [frozenset() if padded else frozenset({"attention_mask"})]


def test_heads_are_planned_on_the_rows_that_have_a_label(graph):
    labels = torch.full_like(BATCH["labels"], -100)
    labels[:, 0] = 3
    few = {**BATCH, "labels": labels}
    head = sparse_head(graph)
    assert head is not None and labelled_share(graph, few, 8, head) == pytest.approx(1 / labels.shape[1])
    running = graph_to_run(graph, (), lambda head: labelled_share(graph, few, 8, head))
    changed = [b.index for a, b in zip(graph.blocks, running.blocks) if a.key != b.key]
    assert changed == [len(graph.blocks) - 1]
    all_labelled = {**BATCH, "labels": torch.ones_like(labels)}
    assert graph_to_run(graph, (), lambda head: labelled_share(graph, all_labelled, 8, head)) is graph
    find_plan_here(graph, RanncConfig(), gathered(few), CPU, 2).check(graph, 2)


def test_memory_suffices_for_padded_batches(graph):
    """Batches without padding are planned with the memory of those that have some, and the time of their own."""
    config = RanncConfig(replicas=(2,), microbatches=2)
    unpadded, padded = (
        find_plan_here(graph, config, gathered(unpadded=masks), CPU, 2) for masks in (["attention_mask"], [])
    )
    needs = [p.stages[0].predicted_memory_bytes for p in (unpadded, padded)]
    assert needs[0] >= needs[1] and unpadded.step_time_us <= padded.step_time_us


def test_larger_samples_and_a_lack_of_memory_are_explained(monkeypatch):
    warned = []
    monkeypatch.setattr("rannc_hf.engine.setup.logger.warning", lambda text, *values: warned.append(text % values))

    def body(transport):
        model = RanncModel(CASE.model(), RanncConfig(length_multiple=1), device=CPU, transport=transport)
        short = {k: v[:, :4].contiguous() if v.dim() > 1 else v for k, v in BATCH.items()}
        model(**short).loss.backward()
        assert not warned
        model(**BATCH).loss.backward()
        monkeypatch.setattr(Executor, "run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError, match="no memory") as caught:
            model(**BATCH)
        return caught.value.__notes__

    (notes,) = LocalWorld(1).run(body)
    assert len(notes) == 1 and "rank 0 runs stages[0] of the plan, for which it predicts" in notes[0]
    (warning,) = warned
    assert "times as large as those that the plan was made for" in warning


def point(samples: int, factor: float) -> BlockCost:
    return BlockCost(samples, *(round(factor * samples * n) for n in (100, 200, 100, 1000, 500, 300)))


def test_costs_of_compiled_blocks_are_measured_at_the_sizes_of_the_plan(graph, monkeypatch):
    measured = []

    def made_up(part, device, where, samples, compiled=False, recompute=True):
        assert compiled
        measured.append(samples)
        return CostTable(device, torch.float32, {b.key: (point(samples[0], 0.5),) for b in part.blocks}, {}, "measured")

    monkeypatch.setattr("rannc_hf.cost.choose.measured_costs", made_up)
    device = module.Cluster.here(1, 1, "cpu").device
    keys = {b.key for b in graph.blocks}
    points = {key: tuple(point(n, 1.0) for n in (1, 2, 4, 8)) for key in keys}
    plain = CostTable(device, torch.float32, points, {}, "measured")
    made = compiled_costs(plain, graph, CPU, {3: graph.blocks, 4: graph.blocks}, cached=False)
    assert measured == [[3], [4]]
    for key in keys:
        assert [p.samples for p in made.points[key]] == [1, 2, 3, 4, 8]
        assert all(made.of_key(key, n) == point(n, 0.5) for n in (1, 2, 3, 4, 8))


def test_plans_for_a_compiling_engine_predict_compiled_blocks(graph, monkeypatch):
    halved = []

    def compiled(costs, running, where, sizes, recompute):
        assert not recompute
        halved.append(set(sizes))
        points = {
            k: tuple(replace(p, forward_us=p.forward_us / 2, backward_us=p.backward_us / 2) for p in v)
            for k, v in costs.points.items()
        }
        return replace(costs, points=points)

    monkeypatch.setattr(module, "compiled_costs", compiled)
    plain = find_plan_here(graph, RanncConfig(costs="measured", microbatches=2, replicas=(2,)), gathered(), CPU, 2)
    assert not halved
    options = RanncConfig(costs="measured", microbatches=2, replicas=(2,), compile=True)
    plan = find_plan_here(graph, options, gathered(), CPU, 2)
    assert halved == [{2}]
    assert plan.stages[0].predicted_forward_us == pytest.approx(plain.stages[0].predicted_forward_us / 2)
