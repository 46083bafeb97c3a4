"""`parallelize` between two processes: against DistributedDataParallel, and what memory building and placing take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import rannc_hf
from tests.multiprocess.launch import run_ranks
from tests.parity.harness import difference, largest, loss_of, shards
from tests.parity.models import CASES

pytestmark = pytest.mark.multiprocess
MIB = 1 << 20
WIDTH, LAYERS = 1448, 24
LAYER_MIB = WIDTH * WIDTH * 4 / MIB


class Tower(nn.Module):
    """Layers of 8 MiB each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return functional.cross_entropy(x, labels)


def memory(field: str) -> float:
    """A figure of this process in MiB: VmRSS or VmHWM, its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{field}:"))


def place(width: int, deferred: bool) -> tuple[float, float, float]:
    """Build and place a model on two ranks: growth of memory, at its peak and lasting, and what is owned, in MiB."""
    before = memory("VmRSS")
    torch.manual_seed(0)
    if deferred:
        with rannc_hf.deferred_init():
            model: nn.Module = Tower(width)
    else:
        model = Tower(width)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = (torch.randn(2, width), torch.tensor([0, 1]))
    wrapped, _ = rannc_hf.parallelize(model, optimizer, batch, stages=2, microbatches=2, show_plan=False)
    own = sum(p.numel() for p in wrapped.parameters()) * 4 / MIB
    return memory("VmHWM") - before, memory("VmRSS") - before, own


def train(model: Any, optimizer: torch.optim.Optimizer, part: dict[str, torch.Tensor]) -> list[float]:
    losses = []
    for _ in range(4):
        loss = loss_of(model(**part))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5, fused=True)


def run(rank: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    case = CASES["resnet"]
    part = shards(case.batch_as(8, torch.float32), 2)[rank]
    reference = DistributedDataParallel(case.model(torch.float32))
    wanted = train(reference, optimizer_of(reference), part)

    torch.manual_seed(0)
    with rannc_hf.deferred_init():
        own = case.build()
    optimizer = optimizer_of(own)
    model, same = rannc_hf.parallelize(own, optimizer, part, stages=2, microbatches=2, show_plan=False)
    assert same is optimizer and model.partitioned
    losses = train(model, optimizer, part)
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in updated] == [id(p) for p in model.parameters()]

    # The first one also loads what capturing and planning need.
    place(64, True)
    figures = place(WIDTH, True)
    whole, _, _ = place(WIDTH, False)
    return {
        "losses": losses,
        "wanted": wanted,
        "state": model.full_state_dict(),
        "reference": {k: v.clone() for k, v in reference.module.state_dict().items()},
        "memory": (*figures, whole),
    }


def test_it_trains_as_ddp_does_and_takes_the_memory_of_its_part():
    results = run_ranks(run, 2, timeout_s=200)
    for result in results:
        assert result["losses"] == pytest.approx(result["wanted"], rel=1e-6)
        peak, lasting, own, whole = result["memory"]
        assert own < 0.6 * LAYERS * LAYER_MIB
        assert lasting < own + 16, result["memory"]
        assert peak < own + 2 * LAYER_MIB + 16, result["memory"]
        assert whole > LAYERS * LAYER_MIB, "the measurement shows nothing"
    assert results[1]["state"] == {}
    floor = largest(results[0]["reference"].values())
    for name, value in results[0]["reference"].items():
        assert difference(results[0]["state"][name], value, floor) < 1e-5, name
