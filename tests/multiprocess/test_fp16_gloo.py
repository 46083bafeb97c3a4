"""fp16 under accelerate in two processes: what overflows on one stage is skipped on both, schedulers included."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accelerate.utils import GradScalerKwargs
from torch import nn

from rannc_hf import RanncAccelerator
from tests.multiprocess.launch import run_ranks

pytestmark = pytest.mark.multiprocess

OVERFLOWS = {1: 0, 4: 1}
"""Steps in which a gradient of one stage is made infinite, and whose."""


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return nn.functional.mse_loss(inputs, targets)


def train(rank: int) -> dict[str, Any]:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"  # asked for, not used: ranks are connected
    accelerator = RanncAccelerator(
        mixed_precision="fp16",
        gradient_accumulation_steps=2,
        kwargs_handlers=[GradScalerKwargs(init_scale=256.0, growth_interval=2)],
        rannc={"stages": 2, "microbatches": 2},
    )
    inner = Chain()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, scheduler = accelerator.prepare(inner, optimizer, scheduler)
    record: dict[str, Any] = {"skipped": [], "scales": [], "rates": [], "losses": [], "changed": []}
    for step in range(6):
        for part in range(2):
            generator = torch.Generator().manual_seed(10 * step + 2 * part + rank)
            batch = {name: torch.randn(4, 8, generator=generator) for name in ("inputs", "targets")}
            with accelerator.accumulate(model):
                loss = model(**batch)
                accelerator.backward(loss)
                held = list(model.parameters())
                before = [p.detach().clone() for p in held]
                if accelerator.sync_gradients and OVERFLOWS.get(step) == rank:
                    assert held[0].grad is not None
                    held[0].grad.view(-1)[0] = float("inf")
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        record["losses"].append(loss.item())
        record["skipped"].append(accelerator.optimizer_step_was_skipped)
        record["scales"].append(accelerator.scaler.get_scale())
        record["rates"].append(scheduler.get_last_lr()[0])
        record["changed"].append(any(not torch.equal(a, b) for a, b in zip(before, held)))
    record["parameters"] = len(held)
    return record


def test_steps_are_skipped_together():
    first, second = run_ranks(train, 2, timeout_s=240)
    assert first.pop("parameters") > 0 and second.pop("parameters") > 0, "both hold a stage"
    assert first == second
    assert first["skipped"] == [step in OVERFLOWS for step in range(6)]
    assert first["changed"] == [step not in OVERFLOWS for step in range(6)]
    # Halved where it overflowed, doubled after two steps in a row.
    assert first["scales"] == [256.0, 128.0, 128.0, 256.0, 128.0, 128.0]
    # accelerate steps the scheduler once a process.
    assert first["rates"] == pytest.approx([0.1 / 4**n for n in (1, 1, 2, 3, 3, 4)])
    assert first["losses"][-1] > 0
