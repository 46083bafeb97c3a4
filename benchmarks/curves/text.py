"""Text-like batches for BERT pretraining that can be learned: pairs of sentences from two random grammars."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Batch = dict[str, torch.Tensor]

CLASS, SEPARATOR, MASK, FIRST_WORD = 2, 3, 4, 5
LABELLED, SHOWN, REPLACED = 0.15, 0.1, 0.1
"""Share of words with a label; of them, shares that are shown as they are, and that another word replaces."""


@dataclass(frozen=True)
class Grammar:
    """Two grammars over `words` words: in each, a word is followed by one of a few, with fixed probabilities.

    A sample is `[CLS] A [SEP] B [SEP]`. B is in A's grammar (next_sentence_label 0) or in the other (1). First words
    have probabilities that fall as 1 / rank, as in text.
    """

    words: int
    length: int
    seed: int = 0
    weights: tuple[float, ...] = (0.6, 0.2, 0.12, 0.08)

    def batch(self, samples: int, step: int) -> Batch:
        """The batch of a step: always the same one for the same step, and no two alike."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + step)
        first = torch.randint(0, 2, (samples,), generator=generator)
        other = torch.randint(0, 2, (samples,), generator=generator)
        half = (self.length - 3) // 2
        a = self._sentences(first, half, generator)
        b = self._sentences((first + other) % 2, self.length - 3 - half, generator)
        column = torch.full((samples, 1), SEPARATOR)
        words = torch.cat([torch.full_like(column, CLASS), a, column, b, column], dim=1)
        types = torch.zeros_like(words)
        types[:, half + 2 :] = 1
        ids, labels = self._hide(words, generator)
        return {"input_ids": ids, "token_type_ids": types, "labels": labels, "next_sentence_label": other}

    def _sentences(self, grammars: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
        """One sentence in each of `grammars`: `[samples, length]`."""
        followers = self._followers()
        start = 1.0 / torch.arange(1, self.words + 1)
        word = torch.multinomial(start, len(grammars), replacement=True, generator=generator)
        choices = torch.multinomial(
            torch.tensor(self.weights), len(grammars) * length, replacement=True, generator=generator
        ).view(length, -1)
        words = []
        for choice in choices:
            words.append(word)
            word = followers[grammars, word, choice]
        return torch.stack(words, dim=1) + FIRST_WORD

    def _followers(self) -> torch.Tensor:
        """Words that follow each word in each grammar: `[2, words, choices]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.words, (2, self.words, len(self.weights)), generator=generator)

    def _hide(self, words: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Words as the model sees them, and labels: the words to be found, -100 elsewhere."""
        labelled = (torch.rand(words.shape, generator=generator) < LABELLED) & (words >= FIRST_WORD)
        kind = torch.rand(words.shape, generator=generator)
        wrong = torch.randint(FIRST_WORD, FIRST_WORD + self.words, words.shape, generator=generator)
        seen = torch.where(kind < SHOWN, words, torch.where(kind < SHOWN + REPLACED, wrong, MASK))
        return torch.where(labelled, seen, words), torch.where(labelled, words, -100)
