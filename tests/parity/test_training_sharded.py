"""Whatever the replicas of a stage divide, training equals plain training in one process."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.capture import Graph
from rannc_hf.engine import RanncModel
from rannc_hf.partition.plan import Plan
from tests.parity.harness import (
    EXACT,
    LEARNING_RATE,
    SINGLE,
    MakeOptimizer,
    Result,
    check,
    compare,
    difference,
    even_plan,
    gradients_of,
    largest,
    loss_of,
    merge,
    on_ranks,
    optimizer_of,
    plain,
    planner,
    result_of,
    shards,
)
from tests.parity.models import CASES, Batch

KINDS = ["optimizer", "gradients", "parameters"]
PLANS = [
    ((1, 3), "1f1b", "blocks"),
    ((2, 2), "gpipe", "none"),
    ((2, 1, 1), "1f1b", "none"),
    ((3,), "gpipe", "blocks"),
    ((3,), "1f1b", "none"),
]
# Every kind meets every plan and every model; the models' turns shift from kind to kind.
NAMES = ["bert", "gpt2", "llama", "t5", "vit"]
TURNS = [(kind, *plan, NAMES[(i + 2 * k) % 5]) for k, kind in enumerate(KINDS) for i, plan in enumerate(PLANS)]


@pytest.mark.parametrize(("shard", "replicas", "schedule", "recompute", "name"), TURNS, ids=str)
def test_float64(shard: str, replicas: tuple[int, ...], schedule: str, recompute: str, name: str):
    case = CASES[name]
    check(
        case.model(), case.batch_as(10), replicas,
        microbatches=3, schedule=schedule, recompute=recompute, shard=shard, steps=3,
    )  # fmt: skip


@pytest.mark.parametrize(("shard", "name"), zip(KINDS, ["gpt2", "vit", "bert"]))
def test_float32(shard: str, name: str):
    case = CASES[name]
    batch = case.batch_as(8, torch.float32)
    check(case.model(torch.float32), batch, (2, 2), shard=shard, steps=3, tolerance=SINGLE)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    """Keeps sums over rows and columns of each parameter, so it must see whole ones."""
    return torch.optim.Adafactor(model.parameters(), lr=LEARNING_RATE)


@pytest.mark.parametrize("make_optimizer", [momentum, adafactor])
@pytest.mark.parametrize("shard", KINDS)
def test_other_optimizers(shard: str, make_optimizer: MakeOptimizer):
    case = CASES["resnet"]
    check(case.model(), case.batch_as(6), (1, 2), shard=shard, make_optimizer=make_optimizer)


def uneven(graph: Graph, samples: int) -> Plan:
    """Stages divide different things, and their ranks are in no order."""
    plan = even_plan(graph, (3, 2), 2, samples)
    first, second = plan.stages
    stages = (replace(first, ranks=(3, 0, 2), shard="parameters"), replace(second, ranks=(4, 1), shard="optimizer"))
    return replace(plan, stages=stages)


def steps_with_accumulation(
    model: Any, optimizer: torch.optim.Optimizer, batches: list[Batch], unseen: Batch, clip: Any
) -> tuple[list[float], list[float]]:
    """Two optimizer steps of two backwards each, an evaluation after each of them; losses and evaluation losses."""
    losses, evaluations = [], []
    for step in range(2):
        for batch in batches:
            loss = loss_of(model(**batch))
            (loss / 2).backward()
            losses.append(loss.item())
        clip(0.5)
        optimizer.step()
        # Cleared in place once: gradients that are kept must be added to as zeros.
        optimizer.zero_grad(set_to_none=step == 1)
        model.eval()
        with torch.no_grad():
            evaluations.append(loss_of(model(**unseen)).item())
        model.train()
    return losses, evaluations


@pytest.mark.parametrize("shard", [*KINDS, "uneven"])
def test_accumulation_clipping_and_evaluation_between_steps(shard: str):
    model, ranks = CASES["resnet"].model(), 5
    batches = [CASES["resnet"].batch_as(n) for n in (10, 7)]
    unseen = CASES["resnet"].batch_as(5)
    parts = [shards(batch, ranks) for batch in batches]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[Result, list[float]]:
        own = [part[rank] for part in parts]
        losses, evaluations = steps_with_accumulation(wrapped, optimizer, own, unseen, wrapped.clip_grad_norm_)
        loss_of(wrapped(**own[0])).backward()
        return result_of(wrapped, losses), evaluations

    results = on_ranks(model, ranks, uneven if shard == "uneven" else planner((3, 2), 2, shard=shard), run)
    expected = copy.deepcopy(model)
    optimizer = optimizer_of(expected)
    losses, evaluations = steps_with_accumulation(
        expected, optimizer, batches, unseen, lambda limit: nn.utils.clip_grad_norm_(expected.parameters(), limit)
    )
    loss_of(expected(**batches[0])).backward()
    gradients = {n: p.grad for n, p in expected.named_parameters()}
    values = {n: p.detach() for n, p in expected.named_parameters()}
    compare(merge([result for result, _ in results]), Result(losses, gradients, values, []), EXACT)
    for _, found in results:
        assert found == pytest.approx(evaluations, rel=1e-9)


@pytest.mark.parametrize("shard", KINDS)
def test_bfloat16_copies_equal_those_of_whole_replicas(shard: str):
    """The same numbers are added up in fp32, in another order."""
    case = CASES["gpt2"]
    model, batch = case.model(torch.float32), case.batch_as(6, torch.float32)
    parts = shards(batch, 3)

    def train(kind: str) -> Result:
        def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
            losses, gradients = [], {}
            for _ in range(3):
                loss = loss_of(wrapped(**parts[rank]))
                loss.backward()
                losses.append(loss.item())
                gradients = gradients or gradients_of(wrapped)
                optimizer.step()
                optimizer.zero_grad()
            assert wrapped.store is not None
            assert all(leaf.dtype == torch.bfloat16 for leaf in wrapped.store.compute.values())
            return replace(result_of(wrapped, losses), gradients=gradients)

        make_plan = planner((1, 2), 2, shard=kind)
        return merge(on_ranks(model, 3, make_plan, run, compute_dtype=torch.bfloat16))

    whole, divided = train("none"), train(shard)
    assert divided.losses == pytest.approx(whole.losses, rel=1e-6)
    floor = 1e-3 * largest(whole.gradients.values())
    for name, gradient in whole.gradients.items():
        found = divided.gradients[name]
        assert gradient is not None and found is not None
        assert difference(found, gradient, floor) <= 1e-5, name
    # And plain training is as near as bf16 allows.
    assert divided.losses[0] == pytest.approx(plain(model, batch, 1).losses[0], rel=2e-3)


@pytest.mark.parametrize("shard", KINDS)
def test_whole_states_are_gathered_and_loaded(shard: str):
    case = CASES["gpt2"]
    parts = shards(case.batch_as(6), 3)
    other = {k: v * 1.5 if v.is_floating_point() else v for k, v in case.model().state_dict().items()}

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss_of(wrapped(**parts[rank])).backward()
        wrapped.load_state_dict(other)
        loaded = wrapped.full_state_dict()
        optimizer.zero_grad()
        loss = loss_of(wrapped(**parts[rank]))
        loss.backward()
        return loaded, result_of(wrapped, [loss.item()])

    results = on_ranks(case.model(), 3, planner((1, 2), 2, shard=shard), run)
    states = [state for state, _ in results]
    assert states[1:] == [{}, {}] and list(states[0]) == list(other)
    assert all(torch.equal(states[0][k], v) for k, v in other.items())
    expected = case.model()
    expected.load_state_dict(other)
    reference = plain(expected, case.batch_as(6), 1)
    result = merge([result for _, result in results])
    compare(replace(result, parameters={}), replace(reference, parameters={}), EXACT)


class SharedQuery(nn.Module):
    """A parameter is expanded first and used last, so a view of it crosses every block in between."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6))
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        query = self.query.expand(x.shape[0], -1)
        for layer in self.layers:
            x = layer(x + query).tanh()
        return {"loss": nn.functional.cross_entropy(x * query, labels)}


@pytest.mark.parametrize(("replicas", "recompute"), [((2,), "blocks"), ((2, 2), "none")], ids=str)
def test_a_view_of_a_parameter_outlives_its_block(replicas: tuple[int, ...], recompute: str):
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 6).double(), "labels": torch.arange(8) % 6}
    check(SharedQuery().double(), batch, replicas, shard="parameters", recompute=recompute, steps=3)
