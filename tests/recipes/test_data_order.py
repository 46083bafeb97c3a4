"""Which samples a process gets: every one once an epoch, whatever the number of ranks and resumes."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data import HeldOutSamples, ShareOfBatches, TrainingSamples, held_out_loader, training_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import IGNORED
from order import permute, sample_at
from samples import Sample, SampleReader

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_an_order_has_every_number_once(size, key):
    assert sorted(permute(np.arange(size), size, (key,))) == list(range(size))


def test_orders_look_random():
    size = 10_000
    order = permute(np.arange(size), size, (0, 0))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert len(set(map(tuple, (permute(np.arange(4), 4, (key,)) for key in range(400))))) == 24


def test_a_stream_has_another_order_in_each_epoch():
    epochs, samples = sample_at(np.arange(30), 10, seed=3)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    orders = samples.reshape(3, 10)
    assert (np.sort(orders, 1) == np.arange(10)).all()
    assert len({tuple(order) for order in orders}) == 3
    assert sample_at(np.array([17, 4]), 10, seed=3)[1].tolist() == samples[[17, 4]].tolist()


@dataclasses.dataclass
class Numbers:
    """Stands for a reader of so many samples."""

    size: int
    seed: int = 5

    def __len__(self):
        return self.size

    def read(self, number, epoch):
        return Sample(number, epoch, [], 0)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(3, 70),
    share=st.integers(1, 3),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_samples_are_seen_once_an_epoch_across_resumes_on_other_numbers_of_ranks(size, share, runs):
    """Runs of some steps each follow each other, on 1 to 4 ranks, most of them stopped within an epoch."""
    batch, samples, seen = 12 * share, TrainingSamples(Numbers(size)), []
    for ranks, steps in runs:
        shares = [iter(ShareOfBatches(batch, rank, ranks, len(seen))) for rank in range(ranks)]
        for _ in range(steps):
            seen += [(s.epoch, s.number) for own in shares for s in samples.__getitems__(next(own))]
    epochs, numbers = sample_at(np.arange(len(seen)), size, 5)
    assert seen == list(zip(epochs.tolist(), numbers.tolist()))
    assert max(Counter(seen).values(), default=1) == 1
    whole = len(seen) // size
    assert {(e, n) for e in range(whole) for n in range(size)} <= set(seen)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 4))
def test_held_out_samples_are_seen_once_by_equally_many_on_each_rank(size, ranks):
    parts = [HeldOutSamples(Numbers(size), rank, ranks) for rank in range(ranks)]
    found = [[s.number for s in part.__getitems__(list(range(len(part))))] for part in parts]
    assert len(set(map(len, found))) == 1
    assert sorted(n for part in found for n in part if n >= 0) == list(range(size))


def joined(batches):
    """Batches of all ranks as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume(data, recipe):
    whole = list(islice(training_loader(data, recipe, rank=0, ranks=1), 4))
    assert all(len(batch["labels"]) == 8 for batch in whole)
    for ranks in (2, 4):
        loaders = [training_loader(data, recipe, rank=rank, ranks=ranks, consumed=16) for rank in range(ranks)]
        for expected, parts in zip(whole[2:], zip(*loaders)):
            assert_same(joined(parts), expected)
    behind = next(iter(training_loader(data, recipe, rank=0, ranks=1, consumed=3)))
    assert torch.equal(behind["labels"][:5], whole[0]["labels"][3:])
    with pytest.raises(ValueError, match="batch_size=8 cannot be shared evenly by 3"):
        training_loader(data, recipe, rank=0, ranks=3)


def test_processes_that_load_ahead_change_nothing(data, recipe):
    alone = training_loader(data, recipe, rank=1, ranks=2)
    helped = training_loader(data, recipe, rank=1, ranks=2, workers=2)
    for expected, batch in zip(islice(alone, 5), helped):
        assert_same(batch, expected)


def test_held_out_batches_are_those_of_one_process(data, recipe):
    (whole,) = held_out_loader(data, with_batch_size(recipe, 4000), rank=0, ranks=1)
    ranks = [list(held_out_loader(data, with_batch_size(recipe, 12), rank=rank, ranks=3)) for rank in range(3)]
    assert len({tuple(len(batch["labels"]) for batch in batches) for batches in ranks}) == 1
    everything = joined([batch for batches in ranks for batch in batches])
    real = everything["next_sentence_label"] != IGNORED
    assert (everything["labels"][~real] == IGNORED).all()
    rows = {name: sorted(values[real].tolist()) if name == "labels" else None for name, values in everything.items()}
    assert rows["labels"] == sorted(whole["labels"].tolist())
    other = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=9, batch_size=4000))
    assert_same(next(iter(held_out_loader(data, other, rank=0, ranks=1))), whole)


def with_batch_size(recipe, size):
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=size))


def test_epochs_and_seeds_give_other_batches(data, recipe):
    samples = len(SampleReader(data, recipe.data, "train", 0))
    first = next(iter(training_loader(data, recipe, rank=0, ranks=1)))
    second = next(iter(training_loader(data, recipe, rank=0, ranks=1, consumed=samples)))
    other = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=1))
    third = next(iter(training_loader(data, other, rank=0, ranks=1)))
    assert not torch.equal(first["labels"], second["labels"])
    assert not torch.equal(first["labels"], third["labels"])


def test_training_needs_neither_datasets_nor_pyarrow():
    """A machine that only trains has what Transformers needs."""
    reached, left = set(), ["data"]
    while left:
        name = left.pop()
        if name not in reached and (RECIPE / f"{name}.py").is_file():
            for node in ast.walk(ast.parse((RECIPE / f"{name}.py").read_text())):
                left += [node.module] if isinstance(node, ast.ImportFrom) else []
                left += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        reached.add(name)
    assert {"data", "masking", "samples", "shards", "torch"} <= reached
    assert not {"datasets", "pyarrow"} & reached
