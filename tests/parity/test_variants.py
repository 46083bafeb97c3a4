"""Training with the variants that a step allows: heads on the labelled rows, attention without masks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture.passes.sparse_head import SparseHead
from rannc_hf.engine import RanncModel
from tests.parity.harness import (
    EXACT,
    SINGLE,
    Result,
    check,
    compare,
    merge,
    on_ranks,
    plain,
    planner,
    shards,
    train,
)
from tests.parity.models import CASES, VOCABULARY, Batch

SAMPLES = 9


class Chosen(list[int | None]):
    """The capacity of each slice of each step, in the order in which ranks chose."""


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chosen]:
    found = Chosen()
    choose = SparseHead.capacity

    def capacity(self: SparseHead, labelled: int, samples: int) -> int | None:
        found.append(choose(self, labelled, samples))
        return found[-1]

    monkeypatch.setattr(SparseHead, "capacity", capacity)
    yield found


def batch_of(name: str, labels: tuple[int, ...] | None = None, padded: bool = True) -> Batch:
    """A batch of a parity model; `labels` says how many tokens of each sample have a label."""
    batch = CASES[name].batch_as(SAMPLES)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    if labels is not None:
        kept = torch.arange(12) < torch.tensor(labels)[:, None]
        batch["labels"] = torch.where(kept, batch["input_ids"], -100)
    return batch


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize(
    ("name", "replicas"), [("bert", (1,)), ("gpt2", (3,)), ("gpt2", (2, 1)), ("bert", (1, 3))], ids=str
)
def test_float64(name: str, replicas: tuple[int, ...], padded: bool, chosen: Chosen):
    check(CASES[name].model(), batch_of(name, padded=padded), replicas, recompute="blocks", steps=3)
    assert all(c is not None and c < 12 for c in chosen), "every slice has few enough labels"
    slices = 2 * replicas[-1] * 3
    assert len(chosen) == slices, "replicas of the last stage choose for 2 microbatches in each of 3 steps"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_other_models(name: str, chosen: Chosen):
    check(CASES[name].model(), batch_of(name), (1, 2), steps=3)
    assert chosen and all(c is not None for c in chosen)


def test_float32(chosen: Chosen):
    case = CASES["bert"]
    check(case.model(torch.float32), case.batch_as(8, torch.float32), (1, 2), tolerance=SINGLE)
    assert chosen and all(c is not None for c in chosen)


@pytest.mark.parametrize(
    ("labels", "capacities"),
    [
        # Microbatches of 5 and 4 samples: all rows of the first have a label, and none of the second.
        ((12, 12, 12, 12, 12, 0, 0, 0, 0), [None, 1]),
        ((12, 0, 0, 0, 0, 0, 0, 0, 1), [3, 1]),
        ((9, 9, 9, 9, 9, 8, 8, 8, 8), [None, 8]),
    ],
    ids=str,
)
def test_each_microbatch_has_its_own(labels: tuple[int, ...], capacities: list[int | None], chosen: Chosen):
    check(CASES["bert"].model(), batch_of("bert", labels), (1, 1), steps=2)
    assert chosen == capacities * 2


@pytest.mark.parametrize("shard", ["none", "optimizer", "parameters"])
def test_replicas_with_very_different_numbers_of_labels(shard: str, chosen: Chosen):
    # Slices of 2, 2 and 1 samples, then 2, 1 and 1: the second replica has every label.
    check(CASES["bert"].model(), batch_of("bert", (0, 0, 12, 12, 0, 0, 0, 12, 0)), (1, 3), shard=shard, steps=1)
    assert sorted(chosen, key=str) == [1, 1, 1, 1, None, None]


class OneOrTwoLosses(nn.Module):
    """BERT with a second loss for batches that have labels for it."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = CASES["bert"].model()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        next_sentence_label: torch.Tensor | None = None,
    ) -> torch.Tensor:
        made = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        loss = functional.cross_entropy(made.prediction_logits.view(-1, VOCABULARY), labels.view(-1))
        if next_sentence_label is None:
            return loss
        return loss + functional.cross_entropy(made.seq_relationship_logits, next_sentence_label)


@pytest.mark.parametrize(("padded", "shard"), [(True, "none"), (False, "none"), (True, "parameters")])
def test_a_batch_whose_graph_is_cut_otherwise_than_the_planned_one(padded: bool, shard: str, chosen: Chosen):
    model, batch = OneOrTwoLosses(), batch_of("bert", padded=padded)
    del batch["token_type_ids"]
    planned = shards(batch, 3)
    del batch["next_sentence_label"]
    parts = shards(batch, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
        wrapped(**planned[rank]).backward()
        optimizer.zero_grad()
        return train(wrapped, optimizer, parts[rank], steps=1)

    result = merge(on_ranks(model, 3, planner((1, 2), 2, shard=shard), run))
    reference = plain(model, batch, 1)
    assert None in reference.gradients.values(), "only the planned batch uses the head for pairs of sentences"
    compare(result, reference, EXACT)
    assert len(chosen) == 8 and all(c is not None for c in chosen)
