"""On several GPUs: stages and replicas in processes of their own, connected by NCCL, equal one plain process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.gpu.test_cuda import DOUBLE, T5
from tests.multiprocess.launch import run_ranks
from tests.parity.harness import (
    Result,
    compare,
    difference,
    merge,
    on_some,
    optimizer_of,
    plain,
    planner,
    shards,
    train,
)
from tests.parity.models import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="NCCL connects GPUs of different processes: two are needed"
    ),
]

Run = tuple[str, tuple[int, ...], str, int]
"""A model, the replicas of groups of ranks, what they divide, and how many stages each rank runs; others are idle."""

RUNS: dict[int, list[Run]] = {
    2: [
        ("bert", (1, 1), "none", 1),
        ("t5", (1, 1), "none", 1),
        ("gpt2", (2,), "none", 1),
        ("bert", (2,), "optimizer", 1),
        ("gpt2", (2,), "gradients", 1),
        ("bert", (2,), "parameters", 1),
        ("bert", (1, 1), "none", 2),
        ("resnet", (1,), "none", 1),
    ],
    4: [
        ("bert", (1, 1, 1, 1), "none", 1),
        ("t5", (1, 3), "optimizer", 1),
        ("resnet", (2, 1, 1), "gradients", 1),
        ("gpt2", (2, 2), "parameters", 1),
        ("bert", (1, 2), "none", 1),
    ],
}


def train_and_evaluate(rank: int, runs: list[Run]) -> list[tuple[Result, torch.Tensor]]:
    return [train_one(rank, *run) for run in runs]


def train_one(rank: int, name: str, replicas: tuple[int, ...], shard: str, laps: int) -> tuple[Result, torch.Tensor]:
    case = CASES[name]
    ranks, device = torch.distributed.get_world_size(), torch.device("cuda", rank)
    model = case.model().to(device)
    optimizer = optimizer_of(model)
    recompute = "blocks" if shard == "parameters" else "none"
    make_plan = planner(replicas, 3, "interleaved" if laps > 1 else "1f1b", recompute, shard, laps)
    make_plan = on_some(range(sum(replicas)), ranks, make_plan)
    wrapped = RanncModel(
        model, RanncConfig(length_multiple=1, timeout_s=60, compile=False), device=device, planner=make_plan
    )
    wrapped.register_optimizer(optimizer)
    part = {k: v.to(device) for k, v in shards(case.batch_as(9), ranks)[rank].items()}
    result = train(wrapped, optimizer, part, 3)
    wrapped.eval()
    return on_cpu(result), logits_of(wrapped(**part))


def logits_of(outputs: Any) -> torch.Tensor:
    """The first output after the loss, on the CPU."""
    found: torch.Tensor = outputs[1]
    return found.detach().cpu()


def on_cpu(result: Result) -> Result:
    """A result that can leave its process."""
    gradients = {name: None if value is None else value.cpu() for name, value in result.gradients.items()}
    return Result(result.losses, gradients, {n: p.cpu() for n, p in result.parameters.items()}, result.norms)


@pytest.mark.parametrize("ranks", RUNS)
def test_gpus_equal_plain_training(ranks: int):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, and there are {torch.cuda.device_count()}")
    results = run_ranks(train_and_evaluate, ranks, RUNS[ranks], timeout_s=280, backend="nccl")
    for (name, *_), of_ranks in zip(RUNS[ranks], zip(*results)):
        case = CASES[name]
        model = case.model().cuda()
        batch = {k: v.cuda() for k, v in case.batch_as(9).items()}
        reference = plain(model, batch, 3)
        compare(merge([r for r, _ in of_ranks]), on_cpu(reference), T5 if name == "t5" else DOUBLE)
        model.load_state_dict(reference.parameters, strict=False)
        model.eval()
        for part, (_, logits) in zip(shards(batch, ranks), of_ranks):
            assert difference(logits, logits_of(model(**part)), 1e-9) < 1e-6
