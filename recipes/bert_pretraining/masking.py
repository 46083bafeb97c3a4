"""Samples to batches: special tokens, padding, and the tokens that the model has to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from samples import Sample
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position, or of a sample, that the loss leaves out."""


@dataclass(slots=True)
class MaskingCollator:
    """Pads samples to one length and hides some of their tokens, other ones in every epoch.

    Of the tokens chosen, 80 % become [MASK], 10 % a random token and 10 % stay, as in BERT. What is chosen depends on
    `seed`, the sample's epoch and its number alone, not on the batch or process that it comes to: the same data is
    trained on whatever the number of processes.
    """

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    mask_probability: float
    seed: int
    whole_words: bool = False
    label_name: str = "next_sentence_label"
    """The model's name for the label of a sample."""

    _special: np.ndarray = field(init=False, repr=False)
    _inner: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = np.array(self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer))))
        self._special = np.isin(np.arange(len(tokens)), self.tokenizer.all_special_ids)
        self._inner = np.char.startswith(tokens, "##")
        if self.whole_words and not self._inner.any():
            raise ValueError("data: whole_words needs a tokenizer that marks inner pieces of words with ##")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Batch of B samples: `input_ids`, `attention_mask`, `token_type_ids`, `labels` [B, sequence_length] and, for
        samples with a label, `label_name` [B], all int64. `labels` is the token at chosen positions and -100 elsewhere.

        All labels of a filler (`number` below 0) are -100.
        """
        shape = (len(samples), self.sequence_length)
        fields = {
            "input_ids": np.full(shape, self.tokenizer.pad_token_id),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORED),
        }
        for row, sample in enumerate(samples):
            ids, types = self.with_special_tokens(sample)
            inputs, labels = self.mask(ids, sample.number, sample.epoch)
            fields["input_ids"][row, : len(ids)] = inputs
            fields["attention_mask"][row, : len(ids)] = 1
            fields["token_type_ids"][row, : len(ids)] = types
            fields["labels"][row, : len(ids)] = labels
        batch = {name: torch.from_numpy(values) for name, values in fields.items()}
        if samples[0].label is not None:
            batch[self.label_name] = torch.tensor([sample.label for sample in samples])
        return batch

    def with_special_tokens(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Ids and types [N] of `[CLS] segment [SEP] segment [SEP] …`; types are 1 in the second of two segments."""
        cls, sep = ([token] for token in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id))
        ids = np.concatenate([cls, *(part for segment in sample.segments for part in (segment, sep))]).astype(np.int64)
        types = np.zeros_like(ids)
        if sample.label is not None:
            types[len(sample.segments[0]) + 2 :] = 1
        assert len(ids) <= self.sequence_length, f"sample {sample.number} has {len(ids)} tokens"
        return ids, types

    def mask(self, ids: np.ndarray, number: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [N] to model inputs [N] and labels [N]. At least one token is chosen, and never a special one."""
        inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
        if number < 0:
            return inputs, labels
        rng = np.random.default_rng((self.seed, epoch, number))
        ordinary = np.flatnonzero(~self._special[ids])
        # Rounded up or down at random, so that the share is right on average for short samples too.
        count = max(1, int(len(ordinary) * self.mask_probability + rng.random()))
        chosen = self._words(ids, ordinary, count, rng) if self.whole_words else rng.permutation(ordinary)[:count]
        labels[chosen] = ids[chosen]
        action = rng.random(len(chosen))
        inputs[chosen[action < 0.8]] = self.tokenizer.mask_token_id
        replaced = chosen[action >= 0.9]
        inputs[replaced] = rng.integers(len(self._special), size=len(replaced))
        return inputs, labels

    def _words(self, ids: np.ndarray, ordinary: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Positions of random whole words, `count` in all or as many below it as words allow; at least one word."""
        # A piece also starts a word where the one before it is special: a segment may begin within a word.
        starts = ~self._inner[ids[ordinary]] | (np.diff(ordinary, prepend=-2) > 1)
        words = np.split(ordinary, np.flatnonzero(starts)[1:])
        chosen: list[np.ndarray] = []
        for word in (words[i] for i in rng.permutation(len(words))):
            if len(word) <= count or not chosen:
                chosen.append(word)
                count -= len(word)
            if count <= 0:
                break
        return np.concatenate(chosen)
