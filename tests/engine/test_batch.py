"""Shards of all ranks become one global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rannc_hf.engine.batch import Gatherer, GlobalBatch
from rannc_hf.engine.transport import LocalWorld, Transport

CPU = torch.device("cpu")


def gather(batches: list[dict[str, Any]], multiple: int = 1, longest: int | None = None, **pad: float) -> GlobalBatch:
    """The global batch, which must be the same on all ranks."""

    def run(transport: Transport) -> GlobalBatch:
        return Gatherer(transport, CPU, pad, multiple, 7, longest).gather(batches[transport.rank])

    results = LocalWorld(len(batches)).run(run)
    for other in results[1:]:
        for name, value in results[0].fields.items():
            same = torch.equal(value, other.fields[name]) if isinstance(value, torch.Tensor) else True
            assert same, name
    return results[0]


def text(samples: int, length: int) -> dict[str, torch.Tensor]:
    ones = torch.ones(samples, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones.clone(), "labels": ones.clone()}


def test_samples_stay_in_rank_order():
    batch = gather([{"x": torch.arange(2)}, {"x": torch.arange(10, 13)}, {"x": torch.empty(0, dtype=torch.long)}])
    assert batch.fields["x"].tolist() == [0, 1, 10, 11, 12]
    assert batch.shards == (2, 3, 0)
    assert [batch.first(r) for r in range(3)] == [0, 2, 5]


def test_fields_are_padded_by_their_rules():
    batch = gather([text(1, 3), text(2, 5)])
    assert batch.fields["input_ids"][0].tolist() == [1, 1, 1, 7, 7]
    assert batch.fields["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert batch.fields["labels"][0].tolist() == [1, 1, 1, -100, -100]


def test_lengths_are_rounded_up_but_not_beyond_the_model():
    assert gather([text(1, 5), text(1, 3)], multiple=4).fields["input_ids"].shape == (2, 8)
    assert gather([text(1, 5), text(1, 3)], multiple=4, longest=6).fields["input_ids"].shape == (2, 6)


def test_lengths_stay_where_a_field_cannot_be_padded():
    batch = {**text(1, 5), "boxes": torch.zeros(1, 5, 4)}
    assert gather([batch, batch], multiple=4).fields["input_ids"].shape == (2, 5)
    assert gather([batch, batch], multiple=4, boxes=-1).fields["boxes"][0, 5].tolist() == [-1] * 4


def test_fields_without_samples_are_passed_on():
    shared = {"scale": torch.tensor(2.0), "x": torch.zeros(3, 2), "flag": True}
    batch = gather([shared, shared])
    assert batch.fields["scale"].item() == 2.0 and batch.fields["flag"] is True
    assert batch.batched == {"x"}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": torch.zeros(2)}, {"y": torch.zeros(2)}], r"rank 0 passes the fields \['x'\], rank 1 passes \['y'\]"),
        ([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}], "no rule says what to pad it with.*pad: {x: VALUE}"),
        (
            [{"input_ids": torch.zeros(2, 3)}, {"input_ids": torch.zeros(2, 4)}],
            "without an attention_mask padding would change the result",
        ),
        ([{"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.long)}], "'x' has different dtypes"),
        ([{"x": torch.zeros(2), "y": torch.zeros(3)}, {"x": torch.zeros(2)}], "rank 0: fields .* disagree"),
        ([{"a": 1, "x": torch.zeros(2)}, {"a": 2, "x": torch.zeros(2)}], "ranks 0 and 1 pass different arguments"),
        ([{"a": 1}, {"a": 1}], "no tensor with a sample dimension"),
    ],
)
def test_shards_that_do_not_fit_are_refused(batches: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        gather(batches)
