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

    A sample is `[CLS] A [SEP] B [SEP]`. B is in A's grammar (next_sentence_label 0) or in the other (1). In each
    grammar frequencies of words fall about as 1 / rank, as in text, and each has an order of its own: so there is
    something to learn from single words, from the words around, and from their order.
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
        word = torch.multinomial(self._frequencies(), len(grammars), replacement=True, generator=generator)
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
        count = 2 * self.words * len(self.weights)
        ranks = torch.multinomial(self._frequencies(), count, replacement=True, generator=generator).view(2, -1)
        orders = torch.stack([torch.randperm(self.words, generator=generator) for _ in range(2)])
        return orders.gather(1, ranks).view(2, self.words, len(self.weights))

    def _frequencies(self) -> torch.Tensor:
        return 1.0 / torch.arange(1, self.words + 1)

    def _hide(self, words: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Words as the model sees them, and labels: the words to be found, -100 elsewhere."""
        labelled = (torch.rand(words.shape, generator=generator) < LABELLED) & (words >= FIRST_WORD)
        kind = torch.rand(words.shape, generator=generator)
        wrong = torch.randint(FIRST_WORD, FIRST_WORD + self.words, words.shape, generator=generator)
        seen = torch.where(kind < SHOWN, words, torch.where(kind < SHOWN + REPLACED, wrong, MASK))
        return torch.where(labelled, seen, words), torch.where(labelled, words, -100)
