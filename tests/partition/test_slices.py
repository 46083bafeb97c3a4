"""Batch normalisation takes its statistics over slices: automatic plans keep these large enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import cluster
from torch import nn

from rannc_hf.capture import capture
from rannc_hf.config import RanncConfig
from rannc_hf.partition.problem import Problem
from rannc_hf.partition.space import check_options, microbatch_counts, replica_choices


class Net(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, kernel), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean()


def problem(batch: int, kernel: int = 1, **options: Any) -> Problem:
    graph = capture(Net(kernel), {"x": torch.zeros(4, 1, 4, 4)})
    costs: Any = None
    return Problem(graph, costs, cluster(1, 4), batch, RanncConfig(**options))


def choices(given: Problem) -> dict[int, list[int]]:
    return {m: replica_choices(given, m) for m in microbatch_counts(given)}


def test_no_smaller_than_under_data_parallelism():
    # 4 processes would have 8 samples each.
    assert choices(problem(32)) == {1: [1, 2, 3, 4], 2: [1, 2], 4: [1], 8: [], 16: [], 32: []}


def test_sixteen_samples_are_enough():
    assert {m: r for m, r in choices(problem(256)).items() if r} == {
        1: [1, 2, 3, 4], 2: [1, 2, 3, 4], 4: [1, 2, 3, 4], 8: [1, 2], 16: [1],
    }  # fmt: skip


def test_the_user_decides():
    assert choices(problem(32, microbatches=16)) == {16: [1]}
    assert choices(problem(32, microbatches=8, replicas=[1, 3])) == {8: [1, 3]}


def test_a_single_value_is_no_statistic():
    check_options(problem(8, kernel=4, microbatches=4))
    with pytest.raises(ValueError, match="slices of 2 samples"):
        check_options(problem(8, kernel=4, microbatches=8))
    with pytest.raises(ValueError, match="slices of 2 samples"):
        check_options(problem(8, kernel=4, microbatches=4, replicas=[2, 2]))
    check_options(problem(8, kernel=2, microbatches=4, replicas=[2, 2]))
