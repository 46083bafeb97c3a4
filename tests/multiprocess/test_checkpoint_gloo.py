"""Checkpoints between real processes: resumed on other numbers of ranks, and a rank killed in the middle of a write."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rannc_hf.checkpoint import latest, load, save, sharded, verify
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.checkpoint.runs import State, Tiny, batches, other_weights, worst
from tests.multiprocess.launch import run_ranks
from tests.parity.harness import CPU, loss_of, optimizer_of, planner, shards

pytestmark = pytest.mark.multiprocess
TIMEOUT_S = 50.0


def start(replicas: tuple[int, ...], shard: str = "none") -> tuple[RanncModel, torch.optim.Optimizer]:
    """A model that no checkpoint has, and its optimizer."""
    torch.set_num_threads(1)
    module = other_weights(Tiny())
    optimizer = optimizer_of(module)
    config = RanncConfig(length_multiple=1, timeout_s=TIMEOUT_S)
    model = RanncModel(module, config, device=CPU, planner=planner(replicas, 2, shard=shard))
    model.register_optimizer(optimizer)
    return model, optimizer


def steps(model: RanncModel, optimizer: torch.optim.Optimizer, rank: int, first: int, last: int) -> None:
    for batch in batches()[first:last]:
        loss_of(model(**shards(batch, model.transport.world_size)[rank])).backward()
        model.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()


def save_and_go_on(rank: int, folder: Path) -> dict[str, Any]:
    """Stops after two of four steps, goes on in the same processes under the same plan and another one; then a rank is
    killed while it writes."""
    model, optimizer = start((1, 1))
    steps(model, optimizer, rank, 0, 2)
    save(folder / "step_2", model, extra={"step": 2})
    steps(model, optimizer, rank, 2, 4)
    result: dict[str, Any] = {"uninterrupted": model.full_state_dict()}
    for name, replicas, shard in (("same plan", (1, 1), "none"), ("another plan", (2,), "parameters")):
        other, its_optimizer = start(replicas, shard)
        assert load(folder / "step_2", other) == {"step": 2}
        steps(other, its_optimizer, rank, 2, 4)
        result[name] = other.full_state_dict()
    if rank == 1:
        write = sharded.FileSystemWriter.write_data

        def die(*args: Any) -> Any:
            write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        sharded.FileSystemWriter.write_data = die  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        save(folder / "step_4", model)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["waited"] = time.monotonic() - began
    return result


def go_on(
    rank: int, folder: Path, first: tuple[int, ...], then: tuple[int, ...] | None = None
) -> tuple[State, State | None]:
    """Goes on from step 2 under the plan `first`, saves on the way, and, alone, goes on from that save under `then`."""
    model, optimizer = start(first, "gradients")
    load(folder / "step_2", model)
    steps(model, optimizer, rank, 2, 3)
    if then is None:
        save(folder / "step_3", model)
    steps(model, optimizer, rank, 3, 4)
    if then is None:
        return model.full_state_dict(), None
    other, its_optimizer = start(then)
    load(folder / "step_3", other)
    steps(other, its_optimizer, rank, 3, 4)
    return model.full_state_dict(), other.full_state_dict()


def load_damaged(rank: int, folder: Path) -> tuple[str, bool]:
    """The error, and whether the weights are still those from before."""
    model, _ = start((1, 1))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    try:
        load(folder / "step_2", model)
    except ValueError as error:
        return str(error), worst(dict(model.module.state_dict()), before) == 0.0
    return "", False


def test_other_numbers_of_ranks_and_a_rank_that_is_killed(tmp_path: Path):
    first, killed = run_ranks(save_and_go_on, 2, tmp_path, timeout_s=200, may_die=[1])
    assert killed is None
    wanted = first["uninterrupted"]
    assert worst(first["same plan"], wanted) == 0.0
    assert worst(first["another plan"], wanted) < 1e-10
    # The other rank has ended with what it was doing, and the last complete checkpoint is there.
    assert first["error"].startswith("TransportError: rank 0: saving checkpoint") and "writing model" in first["error"]
    assert first["waited"] < 60
    assert not (tmp_path / "step_4").exists() and latest(tmp_path) == tmp_path / "step_2"
    verify(tmp_path / "step_2")
    (four, _), *_ = run_ranks(go_on, 4, tmp_path, (2, 1, 1), timeout_s=200)
    assert worst(four, wanted) < 1e-10
    ((from_two, from_four),) = run_ranks(go_on, 1, tmp_path, (1,), (1,), timeout_s=200)
    assert worst(from_two, wanted) < 1e-10 and worst(from_four, wanted) < 1e-10
    shard = tmp_path / "step_2" / "model" / "__1_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    for message, unchanged in run_ranks(load_damaged, 2, tmp_path, timeout_s=200):
        assert f"model/__1_0.distcp has {len(whole) - 100} bytes instead of {len(whole)}" in message
        assert unchanged
    assert latest(tmp_path) == tmp_path / "step_3"
