"""Cuts documents into sentence pairs for BERT and saves them as a `datasets` folder with a train and a held-out part.

    python prepare.py --config configs/demo.json --source python-docs --tokenizer runs/demo/tokenizer \\
        --output runs/demo/data

A sample is `[CLS] A [SEP] B [SEP]`, as long as the sequence length allows. Half of the time B is the text that follows
A (`next_sentence_label` 0), otherwise a piece of another document (1). Whole documents are held out, so neither A nor B
of a held-out pair was trained on. Masking happens while training, see data.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from corpus import Document, read_documents, split_sentences
from datasets import Dataset, DatasetDict
from settings import DataSettings, Recipe
from transformers import AutoTokenizer, PreTrainedTokenizerBase

IS_NEXT, IS_RANDOM = 0, 1
"""Values of `next_sentence_label`, as `BertForPreTraining` has them."""


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A document as sentences of token ids, without special tokens."""

    name: str
    sentences: list[list[int]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pieces of text as token ids, and the documents they came from."""

    first: list[int]
    second: list[int]
    label: int
    document: str
    second_document: str


def prepare(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, settings: DataSettings, seed: int
) -> DatasetDict:
    """The splits `train` and `held_out` of a source; equal arguments give equal samples.

    Columns: `sample_id` (position in its split), `input_ids` and `token_type_ids` (at most `sequence_length`, not
    padded), `next_sentence_label`, and the names `document` and `second_document` of where A and B came from.
    Raises ValueError where there are fewer than four documents.
    """
    tokenized = [t for d in documents if (t := _tokenize(d, tokenizer)).sentences]
    held_out = max(2, round(len(tokenized) * settings.held_out))
    if len(tokenized) < held_out + 2:
        raise ValueError(
            f"the source has {len(tokenized)} documents; with held_out={settings.held_out} it takes at least "
            f"{held_out + 2}, since each part needs two to draw random partners from"
        )
    random.Random(seed).shuffle(tokenized)
    splits = {"train": tokenized[held_out:], "held_out": tokenized[:held_out]}
    passes = {"train": settings.passes, "held_out": 1}
    return DatasetDict(
        {
            name: Dataset.from_list(
                list(_samples(split, tokenizer, settings.sequence_length, passes[name], f"{seed} {name}"))
            )
            for name, split in splits.items()
        }
    )


def make_pairs(documents: list[TokenizedDocument], index: int, length: int, rng: random.Random) -> Iterator[Pair]:
    """The pairs of one document, each at most `length` tokens together, in the way of Devlin et al. 2018.

    Sentences are gathered until they fill `length`; a random sentence end divides them into A and B. Where B is drawn
    from another document instead, the sentences that B would have had start the next pair, so that no text is lost.
    """
    document = documents[index]
    start = 0
    while start < len(document.sentences):
        chunk: list[list[int]] = []
        # At least two sentences, however long: a chunk of one has no next sentence to show.
        while start + len(chunk) < len(document.sentences) and (len(chunk) < 2 or sum(map(len, chunk)) < length):
            chunk.append(document.sentences[start + len(chunk)])
        cut = rng.randint(1, max(1, len(chunk) - 1))
        first, second = list(chain(*chunk[:cut])), list(chain(*chunk[cut:]))
        label, partner = IS_NEXT, document
        if not second or rng.random() < 0.5:
            label, partner = IS_RANDOM, documents[(index + rng.randrange(1, len(documents))) % len(documents)]
            second = _piece(partner, max(length - len(first), length // 2), rng)
            start += cut
        else:
            start += len(chunk)
        _shorten(first, second, length, rng)
        yield Pair(first, second, label, document.name, partner.name)


def _tokenize(document: Document, tokenizer: PreTrainedTokenizerBase) -> TokenizedDocument:
    sentences = split_sentences(document.text)
    ids = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"] if sentences else []
    return TokenizedDocument(document.name, [i for i in ids if i])


def _piece(document: TokenizedDocument, length: int, rng: random.Random) -> list[int]:
    piece: list[int] = []
    for sentence in document.sentences[rng.randrange(len(document.sentences)) :]:
        piece += sentence
        if len(piece) >= length:
            break
    return piece


def _shorten(first: list[int], second: list[int], length: int, rng: random.Random) -> None:
    """Takes tokens off the longer piece, in place, until both fit; either end may go, so no position is special."""
    while len(first) + len(second) > length:
        longer = first if len(first) > len(second) else second
        del longer[0 if rng.random() < 0.5 else -1]


def _samples(
    documents: list[TokenizedDocument], tokenizer: PreTrainedTokenizerBase, length: int, passes: int, seed: str
) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    sample_id = 0
    for _ in range(passes):
        for index in range(len(documents)):
            for pair in make_pairs(documents, index, length - 3, rng):
                yield {
                    "sample_id": sample_id,
                    "input_ids": [cls, *pair.first, sep, *pair.second, sep],
                    "token_type_ids": [0] * (len(pair.first) + 2) + [1] * (len(pair.second) + 1),
                    "next_sentence_label": pair.label,
                    "document": pair.document,
                    "second_document": pair.second_document,
                }
                sample_id += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--source", required=True, help="see corpus.py")
    parser.add_argument("--text-column", default="text", help="field that holds the text")
    parser.add_argument("--tokenizer", required=True, help="folder that train_tokenizer.py wrote, or a name on the hub")
    parser.add_argument("--output", required=True, help="folder for the samples; the tokenizer is copied into it")
    args = parser.parse_args()
    recipe = Recipe.load(args.config)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    splits = prepare(read_documents(args.source, args.text_column), tokenizer, recipe.data, recipe.training.seed)
    splits.save_to_disk(args.output)
    # With its data, so that training cannot pick another vocabulary.
    tokenizer.save_pretrained(f"{args.output}/tokenizer")
    counts = ", ".join(f"{len(split):,} {name.replace('_', '-')}" for name, split in splits.items())
    print(f"{args.output}: {counts} samples of up to {recipe.data.sequence_length} tokens")


if __name__ == "__main__":
    main()
