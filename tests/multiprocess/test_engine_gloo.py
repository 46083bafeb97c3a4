"""The engine between real processes: parity, errors that reach every rank, a rank that dies."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from rannc_hf.capture import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.multiprocess.launch import run_ranks
from tests.parity.harness import (
    CPU,
    EXACT,
    Result,
    compare,
    difference,
    even_plan,
    loss_of,
    merge,
    on_some,
    optimizer_of,
    plain,
    planner,
    shards,
    train,
)
from tests.parity.models import CASES

pytestmark = pytest.mark.multiprocess


Run = tuple[str, tuple[int, ...], str, int]
"""A model, the replicas of groups of ranks, what they divide, and how many stages each rank runs; others are idle."""


def train_and_evaluate(rank: int, runs: list[Run], steps: int) -> list[tuple[Result, Any, Any]]:
    torch.set_num_threads(1)
    return [train_one(rank, *run, steps) for run in runs]


def train_one(
    rank: int, name: str, replicas: tuple[int, ...], shard: str, laps: int, steps: int
) -> tuple[Result, Any, Any]:
    case = CASES[name]
    model = case.model()
    optimizer = optimizer_of(model)
    recompute = "blocks" if shard == "parameters" else "none"
    make_plan = planner(replicas, 3, "interleaved" if laps > 1 else "1f1b", recompute, shard, laps)
    ranks = torch.distributed.get_world_size()
    make_plan = on_some(range(sum(replicas)), ranks, make_plan)
    wrapped = RanncModel(model, RanncConfig(length_multiple=1, timeout_s=60), device=CPU, planner=make_plan)
    wrapped.register_optimizer(optimizer)
    part = shards(case.batch_as(9), ranks)[rank]
    result = train(wrapped, optimizer, part, steps)
    wrapped.eval()
    return result, wrapped(**part).logits, wrapped.full_state_dict()


# Runs on equally many ranks share their processes: starting those is what takes the time.
@pytest.mark.parametrize(
    "runs",
    [
        [
            ("t5", (1, 2), "none", 1),
            ("vit", (1, 2), "optimizer", 1),
            ("vit", (2, 1), "gradients", 1),
            ("gpt2", (3,), "parameters", 1),
            ("t5", (1, 2), "optimizer", 2),
            ("vit", (1, 1), "none", 1),
        ],
        [("gpt2", (2, 1, 1), "none", 1)],
    ],
    ids=["3 ranks", "4 ranks"],
)
def test_processes_equal_plain_training(runs: list[Run]):
    ranks = sum(runs[0][1])
    results = run_ranks(train_and_evaluate, ranks, runs, 3, timeout_s=300)
    for (name, *_), of_ranks in zip(runs, zip(*results)):
        case = CASES[name]
        result = merge([r for r, _, _ in of_ranks])
        compare(result, plain(case.model(), case.batch_as(9), 3), EXACT)

        model = case.model()
        model.load_state_dict(of_ranks[0][2])
        assert all(state == {} for _, _, state in of_ranks[1:])
        model.eval()
        for part, (_, logits, _) in zip(shards(case.batch_as(9), ranks), of_ranks):
            assert difference(logits, model(**part).logits, 1e-9) < 1e-9


def renamed(graph: Graph) -> Graph:
    """The graph with the hash of another one."""
    return replace(graph, structural_hash="0" * 16)


def make_mistakes(rank: int) -> list[str]:
    torch.set_num_threads(1)
    case = CASES["resnet"]
    part = shards(case.batch_as(4), 2)[rank]
    seen = []

    def attempt(config: RanncConfig, batch: dict[str, Any], plan: Any = None) -> None:
        model = RanncModel(case.model(), config, device=CPU, planner=plan)
        try:
            model(**batch)
        except ValueError as error:
            seen.append(str(error))

    quick = RanncConfig(timeout_s=30)
    attempt(quick, part, lambda graph, samples: even_plan(graph, (1, 1, 1), 2, samples))
    attempt(quick, part, lambda graph, samples: even_plan(renamed(graph), (1, 1), 2, samples))
    attempt(RanncConfig(timeout_s=30, plan="/nowhere/plan.json"), part)
    attempt(RanncConfig(timeout_s=30, stages=7), part)
    attempt(quick, {"pixel_values": part["pixel_values"][:1], "labels": part["labels"]} if rank == 1 else part)
    attempt(quick, {**part, "extra": part["labels"]} if rank == 1 else part)
    attempt(quick, {k: v[: 1 - rank] for k, v in part.items()}, planner((2,), 1))
    return seen


def test_mistakes_are_told_on_every_rank():
    first, second = run_ranks(make_mistakes, 2, timeout_s=120)
    assert first == second, "ranks were told different things"
    expected = [
        "`stages[2].ranks` has rank 2",
        "graph_hash",
        "/nowhere/plan.json",
        "stages=7",
        "'pixel_values' has one entry a sample on some ranks and not on others",
        "rank 1 passes ['extra',",
        "stages[0] has 2 replicas that each need one",
    ]
    assert len(first) == len(expected), first
    for message, part in zip(first, expected):
        assert part in message, message


def die_in_second_step(rank: int) -> str:
    torch.set_num_threads(1)
    case = CASES["resnet"]
    wrapped = RanncModel(case.model(), RanncConfig(timeout_s=30), device=CPU, planner=planner((1, 1, 1), 3))
    part = shards(case.batch_as(9), 3)[rank]
    loss_of(wrapped(**part)).backward()
    if rank == 1:
        os._exit(9)
    started = time.monotonic()
    try:
        loss_of(wrapped(**part)).backward()
    except RuntimeError as error:
        assert time.monotonic() - started < 60
        return str(error)
    raise AssertionError("a rank died and nobody noticed")


def test_a_dead_rank_is_named():
    messages = run_ranks(die_in_second_step, 3, timeout_s=120, may_die=(1,))
    for rank in (0, 2):
        assert "batch" in messages[rank], messages[rank]
        assert f"rank {rank}" in messages[rank]
