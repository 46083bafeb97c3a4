"""What torch would do silently wrong on a part of a model."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from accelerate.local_sgd import LocalSGD
from accelerate.utils import find_executable_batch_size
from torch import nn

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


def test_other_models_are_clipped_as_ever():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), max_norm=0.5)
    assert norm > 0.5
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
