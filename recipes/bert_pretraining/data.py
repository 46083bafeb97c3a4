"""Batches for training and evaluation: which samples, in what order, and which of them fall to a process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from masking import IGNORED, MaskingCollator
from order import sample_at
from samples import Sample, SampleReader
from settings import Recipe
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

_HELD_OUT_SEED = 0
"""Not the recipe's: runs with other seeds are compared on the same masks."""


def training_loader(
    data: Path, recipe: Recipe, *, rank: int, ranks: int, consumed: int = 0, workers: int = 0
) -> DataLoader:
    """Endless batches of `batch_size / ranks` samples for process `rank` of `ranks`.

    Batch i over all ranks together, in their order, is samples `consumed + i * batch_size` and following of an order
    that depends on the seed and the epoch alone, with masks that depend on the seed, the epoch and the sample alone.
    An epoch may end within a batch. So a run that goes on after `consumed` samples sees what it would have seen, on
    any number of ranks. `workers` processes load ahead.

    Raises ValueError where `ranks` do not divide the batch, and where `data` has no samples for the recipe or not all.
    """
    settings = recipe.training
    if settings.batch_size % ranks:
        raise ValueError(f"training: batch_size={settings.batch_size} cannot be shared evenly by {ranks} processes")
    samples = TrainingSamples(SampleReader(data, recipe.data, "train", settings.seed))
    shares = ShareOfBatches(settings.batch_size, rank, ranks, consumed)
    return _loader(samples, data, recipe, settings.seed, shares, workers)


def held_out_loader(data: Path, recipe: Recipe, *, rank: int, ranks: int) -> DataLoader:
    """Each held-out sample once over all ranks, with the same partners and masks in every evaluation of any run.

    All ranks get as many batches of the same sizes. Where there are no more samples, others fill up whose `labels` and
    label are -100 everywhere.
    """
    samples = HeldOutSamples(SampleReader(data, recipe.data, "held_out", _HELD_OUT_SEED), rank, ranks)
    size = max(1, recipe.training.batch_size // ranks)
    batches = [list(range(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
    return _loader(samples, data, recipe, _HELD_OUT_SEED, batches, 0)


@dataclass(slots=True)
class TrainingSamples(Dataset):
    """Samples by their position in the endless stream that all processes share."""

    reader: SampleReader

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """The samples at some positions."""
        epochs, numbers = sample_at(np.array(positions), len(self.reader), self.reader.seed)
        return [self.reader.read(number, epoch) for number, epoch in zip(numbers.tolist(), epochs.tolist())]


@dataclass(slots=True)
class HeldOutSamples(Dataset):
    """Every `ranks`th held-out sample, filled up to as many on each rank."""

    reader: SampleReader
    rank: int
    ranks: int

    def __len__(self) -> int:
        return -(-len(self.reader) // self.ranks)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Samples of this rank; a filler has the number -1."""
        return [self._sample(self.rank + index * self.ranks) for index in indices]

    def _sample(self, number: int) -> Sample:
        if number < len(self.reader):
            return self.reader.read(number, 0)
        sample = self.reader.read(0, 0)
        return Sample(-1, 0, sample.segments, None if sample.label is None else IGNORED)


@dataclass(slots=True)
class ShareOfBatches:
    """Positions of each batch that fall to one rank, for ever."""

    batch_size: int
    rank: int
    ranks: int
    consumed: int

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.ranks
        start = self.consumed + self.rank * share
        while True:
            yield list(range(start, start + share))
            start += self.batch_size


def label_name(recipe: Recipe) -> str:
    """What the recipe's model calls the label of a sample."""
    return "sentence_order_label" if recipe.model["model_type"] == "albert" else "next_sentence_label"


def _loader(
    samples: Dataset, data: Path, recipe: Recipe, seed: int, batches: ShareOfBatches | list[list[int]], workers: int
) -> DataLoader:
    settings = recipe.data
    collator = MaskingCollator(
        AutoTokenizer.from_pretrained(data / "tokenizer"),
        settings.sequence_length,
        settings.mask_probability,
        seed,
        settings.whole_words,
        label_name(recipe),
    )
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
