"""Training that stops and goes on, against training that does not stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rannc_hf.checkpoint import save
from rannc_hf.checkpoint.optimizer import StoredOptimizer
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from tests.checkpoint.runs import Batch, Stage, Tiny, batches, optimizer_kind, other_weights, worst
from tests.parity.harness import CPU, loss_of


def resumed(
    model: nn.Module, data: list[Batch], tmp_path: Path, first: Stage, then: Stage, uninterrupted: Stage
) -> float:
    """Largest difference in weights between a run that was stopped and one that was not; losses are compared too."""
    losses, wanted, rate = uninterrupted.train(model, data)
    first.save = then.load = tmp_path / "stopped"
    first_losses, _, _ = first.train(model, data)
    then_losses, found, then_rate = then.train(other_weights(model), data)
    assert first_losses + then_losses == pytest.approx(losses, rel=1e-9)
    assert then_rate == rate
    return worst(found, wanted)


@pytest.mark.parametrize("shard, late", [("none", False), ("none", True), ("parameters", False)])
def test_the_same_plan_goes_on_bit_by_bit(tmp_path: Path, shard: str, late: bool):
    def stage(steps: int, late: bool = False) -> Stage:
        return Stage((1, 2), steps, shard, late=late)

    assert resumed(Tiny(), batches(), tmp_path, stage(2), stage(2, late), stage(4)) == 0.0


@pytest.mark.parametrize(
    "before, after, shard",
    [
        ((1, 1), (2, 1, 1), "none"),
        ((2, 2), (1,), "gradients"),
        ((2,), (1, 1), "parameters"),
        ((1, 2), (3,), "optimizer"),
        ((1,), (2, 1), "none"),
    ],
    ids=str,
)
def test_another_plan_goes_on_to_rounding(tmp_path: Path, before: tuple[int, ...], after: tuple[int, ...], shard: str):
    stages = Stage(before, 2, shard), Stage(after, 2, shard), Stage(before, 4, shard)
    assert resumed(Tiny(), batches(), tmp_path, *stages) < 1e-10


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adafactor", "rmsprop"])
def test_any_optimizer_goes_on(tmp_path: Path, kind: str):
    def stage(replicas: tuple[int, ...], steps: int) -> Stage:
        return Stage(replicas, steps, make_optimizer=optimizer_kind(kind))

    off = resumed(Tiny(), batches(), tmp_path, stage((1, 2), 2), stage((2, 1, 1), 2), stage((1, 2), 4))
    assert off < 1e-10


def test_dropout_goes_on_bit_by_bit(tmp_path: Path):
    stages = [Stage((2, 1), steps) for steps in (2, 2, 4)]
    assert resumed(Tiny(dropout=0.3), batches(), tmp_path, *stages) == 0.0
    assert Stage((2, 1), 4).train(Tiny(dropout=0.3), batches())[0] != Stage((2, 1), 4).train(Tiny(), batches())[0]


class Normed(Tiny):
    """Training updates the running statistics of its batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = nn.Sequential(nn.Linear(8, 8), nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Unflatten(0, (-1, 6)))
        self.double()


def test_running_statistics_go_on(tmp_path: Path):
    torch.manual_seed(0)
    assert resumed(Normed(), batches(), tmp_path, *(Stage((1, 1), steps) for steps in (2, 2, 4))) == 0.0


def test_before_the_first_batch_rank_0_counts(tmp_path: Path):
    def body(transport: Transport) -> torch.optim.Optimizer:
        module = Tiny()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1 * (transport.rank + 1), momentum=0.9)
        (loss_of(module(**batches()[0])) * (transport.rank + 1)).backward()
        optimizer.step()
        model = RanncModel(module, RanncConfig(), device=CPU, transport=transport)
        model.register_optimizer(optimizer)
        save(tmp_path / "stopped", model)
        return optimizer

    wanted = LocalWorld(2).run(body)[0]
    stored = StoredOptimizer(tmp_path / "stopped" / "model.optimizer_0")
    assert stored.common["groups"][0]["lr"] == 0.1
    model = RanncModel(Tiny(), RanncConfig(), device=CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model.register_optimizer(optimizer)
    stored.load_state(model, optimizer)
    torch.testing.assert_close(optimizer.state_dict()["state"], wanted.state_dict()["state"], rtol=0, atol=0)
