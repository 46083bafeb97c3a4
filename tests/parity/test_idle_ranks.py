"""Ranks that run no stage feed their samples and get the loss, their outputs and a step like all others."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rannc_hf.capture import Graph
from rannc_hf.checkpoint import load, save
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.partition.plan import Plan, PlanFieldError
from rannc_hf.report.figures import Figures
from tests.checkpoint.runs import Tiny, batches
from tests.parity.harness import (
    EXACT,
    EXACT_LENGTHS,
    Planner,
    compare,
    difference,
    loss_of,
    merge,
    on_ranks,
    on_some,
    plain,
    planner,
    shards,
    train,
)

PLANS: list[tuple[tuple[int, ...], int, Planner]] = [
    ((0, 1), 3, planner((1, 1), 2)),
    ((2, 0, 3), 5, planner((1, 2), 2, "gpipe", "blocks", "parameters")),
    ((1, 3), 4, planner((1, 1), 4, "interleaved", laps=2)),
    ((1,), 2, planner((1,), 1)),
]


@pytest.mark.parametrize(("used", "ranks", "make_plan"), PLANS, ids=lambda v: None if callable(v) else str(v))
def test_training_and_evaluation_are_exact(used: tuple[int, ...], ranks: int, make_plan: Planner):
    model, (batch, *_) = Tiny(), batches(9)
    parts = shards(batch, ranks)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        result = train(wrapped, optimizer, parts[rank], 2)
        assert (rank in used) == bool(result.parameters)
        assert ("predicted_memory_gib" in Figures(wrapped).now()) is False, "these plans predict nothing"
        wrapped.eval()
        return result, wrapped(**parts[rank])["logits"], wrapped.full_state_dict()

    results = on_ranks(model, ranks, on_some(used, ranks, make_plan), run)
    result = merge([r for r, _, _ in results])
    compare(result, plain(model, batch, 2), EXACT)
    trained = copy.deepcopy(model).eval()
    state = results[0][2]
    assert state.keys() == model.state_dict().keys()
    trained.load_state_dict(state)
    with torch.no_grad():
        wanted = trained(**batch)["logits"]
    assert difference(torch.cat([logits for _, logits, _ in results]), wanted, 1e-9) < 1e-9


def test_losses_of_the_script_and_the_whole_model():
    model, (batch, *_) = Tiny(), batches()
    passed = shards({"ids": batch["ids"]}, 3)
    labels = batch["labels"].split([len(p["ids"]) for p in passed])

    def loss(logits: torch.Tensor, rank: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 20), labels[rank].reshape(-1))

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss(wrapped(**passed[rank])["logits"], rank).backward()
        gradients = {n: p.grad for n, p in wrapped.store.owned.items()}
        norm = wrapped.clip_grad_norm_(1e9)
        with wrapped.whole():
            return gradients, norm, wrapped.module(**passed[rank])["logits"]

    config = dataclasses.replace(EXACT_LENGTHS, loss="split")
    results = on_ranks(model, 3, on_some((0, 2), 3, planner((1, 1), 2, "gpipe")), run, config)
    for rank, part in enumerate(passed):
        (loss(model(**part)["logits"], rank) / 3).backward()
        assert difference(results[rank][2], model(**part)["logits"], 1e-9) < 1e-9
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n: g for gradients, _, _ in results for n, g in gradients.items()}
    assert not results[1][0] and results[0][1] == results[1][1]
    for name, wanted in trained.items():
        assert difference(found[name], wanted, 1e-9) < 1e-9, name


def test_a_run_goes_on_with_and_without_idle_ranks(tmp_path: Path):
    model, data = Tiny(), batches()
    everywhere, some = on_some((0, 1, 2), 3, planner((1, 2), 2)), on_some((2, 1), 3, planner((1, 1), 2))

    def run(path: Path | None, to: Path | None, first: int, last: int) -> Any:
        def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> list[float]:
            losses = []
            if path is not None:
                load(path, wrapped)
            for batch in data[first:last]:
                losses.append(loss_of(wrapped(**shards(batch, 3)[rank])))
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            if to is not None:
                save(to, wrapped)
            return [x.item() for x in losses]

        return body

    wanted = on_ranks(model, 3, everywhere, run(None, None, 0, 3))[0]
    first = on_ranks(model, 3, some, run(None, tmp_path / "first", 0, 1))[0]
    second = on_ranks(Tiny(), 3, everywhere, run(tmp_path / "first", tmp_path / "second", 1, 2))[0]
    third = on_ranks(Tiny(), 3, some, run(tmp_path / "second", None, 2, 3))[0]
    assert first + second + third == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("idle", "message"),
    [
        ((), r"`stages\[\*\].ranks` use 2 ranks, but there are 3 processes: no stage has 2; .*list .* in `idle`"),
        ((1, 2), r"`idle\[0\]` is 1, which stages\[1\] has"),
        ((2, 2), r"`idle\[1\]` is 2, which is in the list already"),
        ((3,), r"`idle\[0\]` is 3, but there are 3 processes \(0 to 2\)"),
    ],
)
def test_wrong_lists_of_idle_ranks_are_refused(idle: tuple[int, ...], message: str):
    def make(graph: Graph, samples: int) -> Plan:
        return dataclasses.replace(planner((1, 1), 2)(graph, samples), idle=idle)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped(**shards(batches()[0], 3)[rank])

    with pytest.raises((PlanFieldError, ValueError), match=message):
        on_ranks(Tiny(), 3, make, run, RanncConfig())
