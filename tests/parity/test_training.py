"""Loss, every gradient and parameters after five AdamW steps with clipping equal plain training in one process."""

from __future__ import annotations

import pytest
import torch

from tests.parity.harness import SINGLE, check
from tests.parity.models import CASES

PLANS = [
    ((1, 1), "gpipe", "none"),
    ((1, 1, 1, 1), "1f1b", "none"),
    ((1, 3), "1f1b", "blocks"),
    ((3, 1), "gpipe", "none"),
    ((2, 1, 1), "1f1b", "none"),
    ((1, 2, 3), "1f1b", "none"),
]
# Every plan meets half of the models, and every model half of the plans.
TURNS = [(name, *plan) for i, name in enumerate(CASES) for j, plan in enumerate(PLANS) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("name", "replicas", "schedule", "recompute"), TURNS, ids=lambda x: str(x).replace(" ", ""))
def test_float64(name: str, replicas: tuple[int, ...], schedule: str, recompute: str):
    case = CASES[name]
    # 9 samples in 2 microbatches: 5 and 4, so slices are uneven over replicas and microbatches.
    check(case.model(), case.batch_as(9), replicas, schedule=schedule, recompute=recompute)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str):
    case = CASES[name]
    check(
        case.model(torch.float32),
        case.batch_as(8, torch.float32),
        (1, 2, 1),
        microbatches=4,
        tolerance=SINGLE,
    )


def test_one_stage_is_data_parallel():
    case = CASES["bert"]
    check(case.model(), case.batch_as(7), (3,), microbatches=2)


def test_one_rank():
    case = CASES["gpt2"]
    check(case.model(), case.batch_as(5), (1,), microbatches=3)


def test_more_microbatches_than_stages_and_fewer():
    case = CASES["bert"]
    check(case.model(), case.batch_as(12), (1, 1, 1, 1), microbatches=12, steps=2)
    check(case.model(), case.batch_as(12), (1, 1, 1, 1), microbatches=1, steps=2)
