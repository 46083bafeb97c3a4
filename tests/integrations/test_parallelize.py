"""`parallelize` in one process: what it takes and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rannc_hf
from rannc_hf import RanncConfig
from tests.parity.harness import loss_of
from tests.parity.models import CASES

CASE = CASES["resnet"]
BATCH = CASE.batch_as(4, torch.float32)


def model() -> nn.Module:
    return CASE.model(torch.float32)


def test_an_example_batch_plans_at_once(capsys):
    plain = model()
    with torch.no_grad():
        wanted = loss_of(plain(**BATCH))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    wrapped, same = rannc_hf.parallelize(plain, optimizer, BATCH, rannc={"microbatches": 4}, microbatches=2)
    assert wrapped.plan is not None and wrapped.plan.microbatches == 2 and same is optimizer
    assert "microbatches" in capsys.readouterr().out
    torch.testing.assert_close(loss_of(wrapped(**BATCH)), wanted)


@pytest.mark.parametrize("batch", [tuple(BATCH.values()), list(BATCH.values()), BATCH], ids=["tuple", "list", "dict"])
def test_batches_may_be_positional(batch: Any):
    wrapped = rannc_hf.parallelize(model(), example_batch=batch, show_plan=False)
    assert wrapped.partitioned
    loss = loss_of(wrapped(**batch) if isinstance(batch, dict) else wrapped(*batch))
    loss.backward()
    late = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    assert all(p.grad is not None for group in late.param_groups for p in group["params"])


def test_without_an_example_it_plans_at_the_first_batch(capsys):
    wrapped = rannc_hf.parallelize(model(), show_plan=False, dtype=torch.bfloat16)
    assert not wrapped.partitioned
    wrapped(**BATCH)
    assert wrapped.partitioned and wrapped.compute_dtype is torch.bfloat16 and capsys.readouterr().out == ""


def test_mistakes_are_named():
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    frozen = model().requires_grad_(False)
    for message, arguments, options in [
        ("none of the model's parameters", (model(), other), {}),
        ("no parameter with requires_grad", (frozen,), {}),
        ("DataParallel", (nn.DataParallel(model()),), {}),
        ("OptimizedModule", (torch.compile(model()),), {}),
        ("parallel already", (rannc_hf.parallelize(model()),), {}),
        ("dtype=torch.float16", (model(),), {"dtype": torch.float16}),
        ("'meta' is not available", (model(),), {"device": "meta"}),
        ("did you mean `stages`", (model(),), {"stage": 2}),
        ("stages=2", (model(), None, BATCH), {"stages": 2, "show_plan": False}),
        ("no loss", (nn.Linear(2, 2), None, torch.ones(3, 2)), {"show_plan": False, "loss": "fused"}),
    ]:
        with pytest.raises(ValueError, match=message):
            rannc_hf.parallelize(*arguments, **options)
    assert RanncConfig.load(None) == RanncConfig()
