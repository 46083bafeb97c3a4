"""The engine's figures by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rannc_hf.capture import capture
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.report.figures import Figures, training_flops
from tests.parity.harness import CPU, EXACT_LENGTHS, planner
from tests.parity.models import CASES


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.second(torch.relu(self.first(inputs))), targets)


def batch() -> dict[str, torch.Tensor]:
    return {"inputs": torch.ones(6, 8), "targets": torch.zeros(6, 4)}


def test_flops_are_three_times_those_of_the_products_of_the_forward():
    graph = capture(Regression(), batch())
    assert training_flops(graph, 5) == 3 * 2 * 5 * (8 * 16 + 16 * 4)


def test_nodes_of_different_sizes_train_by_a_plan_that_is_given(monkeypatch: pytest.MonkeyPatch):
    case = CASES["resnet"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def run(transport: Transport) -> dict[str, float]:
        plan = planner((1, 1, 1), 2)
        model = RanncModel(case.model(), EXACT_LENGTHS, device=CPU, transport=transport, planner=plan)
        for _ in range(3):
            model(**case.batch_as(2))[0].backward()
        return Figures(model).now()

    for found in LocalWorld(3).run(run):
        assert found.keys() == {"step_ms", "samples_per_s", "tflops_per_device"}, "this plan predicts nothing"


def test_figures_of_a_training():
    model = RanncModel(Regression(), RanncConfig(), device=CPU)
    figures = Figures(model)
    assert figures.now() == {}
    model(**batch()).backward()
    planned = figures.now()
    assert planned.keys() == {"predicted_step_ms", "predicted_bubble", "predicted_memory_gib"}
    assert model.plan is not None
    assert planned["predicted_step_ms"] == model.plan.step_time_us / 1e3
    assert planned["predicted_bubble"] == 0.0, "one stage never waits"
    for _ in range(3):
        model(**batch()).backward()
    found = figures.now()
    measured = {"step_ms", "samples_per_s", "tflops_per_device", "predicted_over_measured"}
    assert found.keys() == planned.keys() | measured, "without tokens and a GPU"
    assert found["samples_per_s"] == pytest.approx(6 / found["step_ms"] * 1e3)
    assert found["tflops_per_device"] == pytest.approx(6 * 1152 / found["step_ms"] * 1e-9)
    assert found["predicted_over_measured"] == pytest.approx(found["predicted_step_ms"] / found["step_ms"])
    assert all(isinstance(value, float) for value in found.values())
