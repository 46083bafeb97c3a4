"""Samples of prepare.py to batches: their order, their share for each process, and their masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from order import sample_at
from settings import Recipe
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that the loss leaves out."""


@dataclass(slots=True)
class MaskingCollator:
    """Pads samples to one length and hides some of their tokens, anew in every epoch.

    Of the tokens chosen, 80 % become [MASK], 10 % a random token and 10 % stay, as in BERT. What is chosen depends on
    `seed`, `epoch` and the sample's id alone, not on the batch or process that a sample comes to: the same data is
    trained on whatever the number of processes.
    """

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    mask_probability: float
    seed: int
    epoch: int = 0
    _special_ids: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._special_ids = self.tokenizer.all_special_ids

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch of B samples: `input_ids`, `attention_mask`, `token_type_ids`, `labels` [B, sequence_length] and
        `next_sentence_label` [B], all int64. `labels` is the token at the chosen positions and -100 elsewhere.

        Raises ValueError for a sample longer than `sequence_length`.
        """
        shape = (len(samples), self.sequence_length)
        fields = {
            "input_ids": np.full(shape, self.tokenizer.pad_token_id),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORED),
        }
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            if length > self.sequence_length:
                raise ValueError(
                    f"sample {sample['sample_id']} has {length} tokens but sequence_length is {self.sequence_length}; "
                    "prepare the data again with this config"
                )
            ids = np.array(sample["input_ids"])
            inputs, labels = self.mask(ids, sample["sample_id"], sample.get("epoch", self.epoch))
            fields["input_ids"][row, :length] = inputs
            fields["labels"][row, :length] = IGNORED if sample.get("filler") else labels
            fields["attention_mask"][row, :length] = 1
            fields["token_type_ids"][row, :length] = sample["token_type_ids"]
        batch = {name: torch.from_numpy(values) for name, values in fields.items()}
        batch["next_sentence_label"] = torch.tensor(
            [IGNORED if sample.get("filler") else sample["next_sentence_label"] for sample in samples]
        )
        return batch

    def mask(self, ids: np.ndarray, sample_id: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [N] to model inputs [N] and labels [N]. At least one token is chosen, and never a special one."""
        rng = np.random.default_rng((self.seed, epoch, sample_id))
        ordinary = np.flatnonzero(~np.isin(ids, self._special_ids))
        # Rounded up or down at random, so that the share is right on average for short samples too.
        count = max(1, int(len(ordinary) * self.mask_probability + rng.random()))
        chosen = rng.permutation(ordinary)[:count]
        inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        action = rng.random(len(chosen))
        inputs[chosen[action < 0.8]] = self.tokenizer.mask_token_id
        replaced = chosen[action >= 0.9]
        inputs[replaced] = rng.integers(len(self.tokenizer), size=len(replaced))
        return inputs, labels


def training_loader(
    data: Path, recipe: Recipe, *, rank: int, ranks: int, consumed: int = 0, workers: int = 0
) -> DataLoader:
    """Endless batches of `batch_size / ranks` samples for process `rank` of `ranks`.

    Batch i over all ranks together, in their order, is samples `consumed + i * batch_size` and following of an order
    that depends on the seed and the epoch alone, with masks that depend on the seed, the epoch and the sample alone.
    An epoch may end within a batch. So a run that goes on after `consumed` samples sees what it would have seen, on
    any number of ranks. `workers` processes load ahead. Raises ValueError where `ranks` do not divide the batch.
    """
    settings = recipe.training
    if settings.batch_size % ranks:
        raise ValueError(f"training: batch_size={settings.batch_size} cannot be shared evenly by {ranks} processes")
    samples = Samples(load_from_disk(str(data))["train"], settings.seed)
    batches = ShareOfBatches(settings.batch_size, rank, ranks, consumed)
    return DataLoader(samples, batch_sampler=batches, collate_fn=_collator(data, recipe), num_workers=workers)


def held_out_loader(data: Path, recipe: Recipe, *, rank: int, ranks: int) -> DataLoader:
    """Each held-out sample once over all ranks, with the same masks in every evaluation.

    All ranks get as many batches: where the samples run out, empty ones fill up, whose `labels` and next sentence
    label are -100 everywhere.
    """
    samples = HeldOutSamples(load_from_disk(str(data))["held_out"], recipe.training.seed, rank, ranks)
    return DataLoader(samples, recipe.training.batch_size // ranks, collate_fn=_collator(data, recipe))


@dataclass(slots=True)
class Samples(TorchDataset):
    """Training samples by position in the endless stream that all processes share."""

    split: Dataset
    seed: int

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position, with the `epoch` that its mask depends on."""
        epochs, found = sample_at(np.array([position]), len(self.split), self.seed)
        return {**self.split[int(found[0])], "epoch": int(epochs[0])}


@dataclass(slots=True)
class HeldOutSamples(TorchDataset):
    """The held-out samples of one rank: every `ranks`th one, filled up to as many on each rank."""

    split: Dataset
    seed: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.ranks)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The `number`th sample of this rank."""
        sample_id = self.rank + number * self.ranks
        filler = sample_id >= len(self.split)
        return {**self.split[0 if filler else sample_id], "epoch": 0, "filler": filler}


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


def _collator(data: Path, recipe: Recipe) -> MaskingCollator:
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/tokenizer")
    return MaskingCollator(tokenizer, recipe.data.sequence_length, recipe.data.mask_probability, recipe.training.seed)
