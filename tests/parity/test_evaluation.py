"""Evaluation gives each rank the outputs of its own samples, whatever their number and length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.parity.harness import difference, loss_of, on_ranks, optimizer_of, planner, shards
from tests.parity.models import CASES, Batch
from tests.parity.test_opaque import batch_of, net


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def shortened(batch: Batch, rank: int) -> Batch:
    """The batch as a collator would have padded it on this rank: to another length on each."""
    if "input_ids" not in batch:
        return batch
    length = batch["input_ids"].shape[1] - rank
    return {k: v[:, :length].contiguous() if v.dim() > 1 else v for k, v in batch.items()}


LAYOUTS = {"chain": ((1, 1), "none"), "sharded": ((1, 3), "parameters"), "three stages": ((2, 1, 1), "none")}


@pytest.mark.parametrize(
    ("name", "layout"),
    # Every model in one layout, every layout with a model that has lengths and one that has none.
    [(name, "sharded") for name in CASES if name != "t5"]
    + [("t5", "three stages"), ("gpt2", "chain"), ("resnet", "chain"), ("resnet", "three stages")],
)
def test_outputs_are_each_ranks_own(name: str, layout: str):
    case = CASES[name]
    replicas, shard = LAYOUTS[layout]
    model, ranks = case.model(), sum(replicas)
    training = shards(case.batch_as(8), ranks)
    # 7 samples: ranks own different numbers, microbatches are smaller than the replicas of a stage.
    own = [shortened(part, rank) for rank, part in enumerate(shards(case.batch_as(7), ranks))]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss_of(wrapped(**training[rank])).backward()
        wrapped.eval()
        with torch.no_grad():
            return wrapped(**own[rank])

    results = on_ranks(model, ranks, planner(replicas, 2, shard=shard), run, RanncConfig(length_multiple=8))
    plain = copy.deepcopy(model).eval()
    for rank, outputs in enumerate(results):
        with torch.no_grad():
            extra = {"use_cache": False} if name == "t5" else {}
            expected = plain(**own[rank], **extra)
        assert type(outputs) is type(expected)
        assert [t.shape for t in tensors(outputs)] == [t.shape for t in tensors(expected)]
        for found, wanted in zip(tensors(outputs), tensors(expected)):
            assert difference(found, wanted, 1e-9) < 1e-9


def test_without_labels_and_back_to_training():
    case = CASES["bert"]
    model = case.model()
    whole = shards(case.batch_as(8), 2)
    unlabelled = [{k: v for k, v in part.items() if "label" not in k} for part in whole]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        first = wrapped(**whole[rank]).loss
        first.backward()
        optimizer.zero_grad()
        wrapped.eval()
        outputs = wrapped(**unlabelled[rank])
        wrapped.train()
        return first.item(), wrapped(**whole[rank]).loss.item(), outputs

    results = on_ranks(model, 2, planner((1, 1), 2), run)
    for rank, (before, after, outputs) in enumerate(results):
        assert before == after
        expected = copy.deepcopy(model).eval()(**unlabelled[rank])
        assert outputs.loss is None
        assert difference(outputs.prediction_logits, expected.prediction_logits, 1e-9) < 1e-9


def test_evaluation_ignores_dropout():
    case = CASES["bert"]
    model = case.model()
    model.config.hidden_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    parts = shards(case.batch_as(8), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        wrapped(**parts[rank]).loss.backward()
        wrapped.eval()
        return wrapped(**parts[rank])

    results = on_ranks(model, 2, planner((1, 1), 2), run)
    plain = copy.deepcopy(model).eval()
    for rank, outputs in enumerate(results):
        assert difference(outputs.prediction_logits, plain(**parts[rank]).prediction_logits, 1e-9) < 1e-9


class WithPenalty(torch.nn.Module):
    """Returns, beside its loss, another mean over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels), "size": scores.square().mean()}


@pytest.mark.parametrize("replicas", [(1, 2), (3,)], ids=str)
def test_every_mean_over_samples_is_added_up(replicas: tuple[int, ...]):
    torch.manual_seed(0)
    model = WithPenalty().double()
    batch = {"x": torch.randn(13, 3).double(), "labels": torch.arange(13) % 3}
    parts = shards(batch, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss_of(wrapped(**parts[rank])).backward()
        wrapped.eval()
        return wrapped(**parts[rank])

    for rank, outputs in enumerate(on_ranks(model, 3, planner(replicas, 4), run)):
        expected = model(**parts[rank])
        assert set(outputs) == {"loss", "size"}
        for name, value in expected.items():
            assert abs(outputs[name] - value).item() <= 1e-12, name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["bert", "opaque"])
def test_inference_mode_leaves_nothing_behind_that_cannot_be_trained(name: str, ranks: int):
    """Evaluated first, with batches made in inference mode, as a loop inside of it makes them; those train too."""
    model = net("experts", "recurrent") if name == "opaque" else CASES[name].model()
    batch = batch_of(6) if name == "opaque" else CASES[name].batch_as(6)

    def follow(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, plain: bool) -> Any:
        evaluated, losses = [], []
        with torch.inference_mode():
            made = {k: v.clone() for k, v in batch.items()}
        for _ in range(2):
            model.eval()
            with torch.inference_mode():
                evaluated.append(tensors(model(**made))[1].clone())
            model.train()
            for given in (batch, batch if plain else made):
                loss = model(**given)[0]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return evaluated, losses

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        return follow(wrapped, optimizer, shards(batch, ranks)[rank], plain=False)

    results = on_ranks(model, ranks, planner((1,) * ranks, ranks), run)
    plain = copy.deepcopy(model)
    evaluated, losses = follow(plain, optimizer_of(plain), batch, plain=True)
    for _, found in results:
        assert found == pytest.approx(losses, abs=1e-9)
    for expected, parts in zip(evaluated, zip(*(parts for parts, _ in results))):
        assert difference(torch.cat(parts), expected, 1e-9) < 1e-7
