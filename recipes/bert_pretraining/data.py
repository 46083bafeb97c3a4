"""Masking: samples of prepare.py to batches for `BertForPreTraining`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

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
            fields["input_ids"][row, :length], fields["labels"][row, :length] = self.mask(ids, sample["sample_id"])
            fields["attention_mask"][row, :length] = 1
            fields["token_type_ids"][row, :length] = sample["token_type_ids"]
        batch = {name: torch.from_numpy(values) for name, values in fields.items()}
        batch["next_sentence_label"] = torch.tensor([sample["next_sentence_label"] for sample in samples])
        return batch

    def mask(self, ids: np.ndarray, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [N] to model inputs [N] and labels [N]. At least one token is chosen, and never a special one."""
        rng = np.random.default_rng((self.seed, self.epoch, sample_id))
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
