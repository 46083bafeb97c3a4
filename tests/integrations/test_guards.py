"""What torch would do silently wrong on a part of a model."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from accelerate.local_sgd import LocalSGD
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.integrations.guards import watch
from tests.parity.harness import CPU, EXACT_LENGTHS, planner, shards


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs).square().mean()


@pytest.mark.parametrize(("replicas", "refused"), [((1, 1), True), ((2,), False)], ids=str)
def test_the_norm_of_a_part_is_refused(replicas: tuple[int, ...], refused: bool):
    model, parts = Chain(), shards({"inputs": torch.ones(4, 4)}, 2)

    def run(transport: Transport) -> list[str]:
        inner = copy.deepcopy(model)
        wrapped = RanncModel(inner, EXACT_LENGTHS, device=CPU, transport=transport, planner=planner(replicas, 2))
        watch(wrapped)
        wrapped(**parts[transport.rank]).backward()
        problems = []
        for parameters in (wrapped.parameters(), inner.parameters(), next(iter(inner.parameters()))):
            try:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            except ValueError as error:
                problems.append(str(error))
        return problems

    for problems in LocalWorld(2).run(run):
        assert len(problems) == (3 if refused else 0)
        assert all("accelerator.clip_grad_norm_(model.parameters(), max_norm)" in text for text in problems)


@pytest.mark.parametrize(("replicas", "refused"), [((1, 1), True), ((2,), False)], ids=str)
def test_norms_and_averages_of_a_part_are_refused(replicas: tuple[int, ...], refused: bool):
    model, parts = Chain(), shards({"inputs": torch.ones(4, 4)}, 2)

    def run(transport: Transport) -> tuple[list[str], float]:
        inner, average = copy.deepcopy(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        wrapped = RanncModel(inner, EXACT_LENGTHS, device=CPU, transport=transport, planner=planner(replicas, 2))
        watch(wrapped)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        wrapped.register_optimizer(optimizer)
        wrapped(**parts[transport.rank]).backward()
        problems = []
        for call in (
            lambda: torch.nn.utils.get_total_norm([p.grad for p in inner.parameters() if p.grad is not None]),
            lambda: average.update_parameters(wrapped),
            lambda: average.update_parameters(inner),
        ):
            try:
                call()
            except ValueError as error:
                problems.append(str(error))
        average.n_averaged.zero_()
        for _ in range(2):
            with wrapped.whole():
                average.update_parameters(inner)
            optimizer.step()
        return problems, sum(p.double().sum().item() for p in average.parameters())

    plain, expected = copy.deepcopy(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.ones(4, 4)).backward()
    for _ in range(2):
        expected.update_parameters(plain)
        optimizer.step()
    total = sum(p.double().sum().item() for p in expected.parameters())
    for problems, found in LocalWorld(2).run(run):
        assert len(problems) == (3 if refused else 0)
        assert not refused or ("float('inf')" in problems[0] and "model.whole()" in problems[1])
        assert found == pytest.approx(total, rel=1e-6)


def test_other_models_are_clipped_as_ever():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    total = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters() if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), max_norm=0.5)
    assert norm == total > 0.5
    assert torch.nn.utils.clip_grad_norm_(layer.weight, 10.0) <= 0.5


def test_accelerates_ways_that_look_at_one_process_are_refused():
    def run(transport: Transport) -> list[str]:
        wrapped = RanncModel(Chain(), EXACT_LENGTHS, device=CPU, transport=transport)
        watch(wrapped)

        @find_executable_batch_size(starting_batch_size=8)
        def train(batch_size: int) -> int:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {batch_size}")

        problems = []
        for call in (lambda: LocalSGD(None, wrapped, 2), train):
            with pytest.raises(ValueError) as error:
                call()
            problems.append(str(error.value))
        return problems

    for sgd, size in LocalWorld(2).run(run):
        assert "enabled=False" in sgd and "set the batch size" in size


def test_alone_a_smaller_batch_is_tried():
    gc.collect()  # models of other tests
    tried = []
    watch(RanncModel(Chain(), EXACT_LENGTHS, device=CPU))

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> int:
        tried.append(batch_size)
        if batch_size > 4:
            raise RuntimeError("CUDA out of memory. ")
        return batch_size

    assert train() == tried[-1] <= 4 and len(tried) > 1
