"""Where documents are cut into samples. Only places are written down, so one tokenized text serves all lengths.

A row of `samples/…/train-00000.npy` is a sample of shard 0: tokens `start` to `middle` are its first segment, `middle`
to `end` its second. Which sentences come together is decided here; what is another in each epoch (masks, random
partners, swapped segments) is decided when a sample is read, see samples.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from settings import DataSettings
from shards import DOCUMENT, ENDS, ArrayFile, Corpus, written_whole

SPLITS = ("train", "held_out")
ROW = np.dtype([("start", ENDS), ("middle", ENDS), ("end", ENDS)])
Row = tuple[int, int, int]


def samples_folder(folder: Path, settings: DataSettings) -> Path:
    """The folder, within a preparation, of samples with these settings."""
    return folder / "samples" / f"{settings.sequence_length}-{settings.next}-x{settings.passes}"


def rows_name(split: str, shard: int) -> str:
    """The file name of a shard's samples."""
    return f"{split}-{shard:05}.npy"


def room(settings: DataSettings) -> int:
    """Tokens of text in a full sample: without [CLS] and the last [SEP], and for two segments the one between."""
    return settings.sequence_length - (2 if settings.next == "none" else 3)


def cut_shard(corpus: Corpus, settings: DataSettings, shard: int) -> None:
    """Writes the samples of a shard."""
    for split in SPLITS:
        with written_whole(samples_folder(corpus.folder, settings) / rows_name(split, shard)) as path:
            file = ArrayFile(path, ROW)
            for number in range(settings.passes if split == "train" else 1):
                for rows in _cut(corpus, settings, shard, split, number):
                    file.append(np.array(rows, ROW))
            file.close()


def _cut(corpus: Corpus, settings: DataSettings, shard: int, split: str, number: int) -> Iterator[list[Row]]:
    length = room(settings)
    documents = _live_documents(corpus, shard, split)
    if settings.next == "none":
        yield from cut_stream(((start, ends[-1]) for start, ends in documents), length)
        return
    rng = random.Random(f"{split} {shard} {number}")
    for start, ends in documents:
        yield list(cut_document(start, split_long(start, ends, length), length, settings.next, rng))


def _live_documents(corpus: Corpus, shard: int, split: str) -> Iterator[tuple[int, list[int]]]:
    """First token and sentence ends of each document of a split."""
    documents, sentences = corpus.array(shard, "documents"), corpus.array(shard, "sentences")
    for document in np.flatnonzero(corpus.live(shard, split)).tolist():
        before = documents[document - 1] if document else np.zeros((), DOCUMENT)
        first, last = int(before["sentence"]), int(documents[document]["sentence"])
        yield int(before["token"]), sentences[first:last].tolist()


def split_long(start: int, ends: list[int], length: int) -> list[int]:
    """Sentence ends of a document that starts at token `start`, with more of them where a sentence exceeds `length`."""
    result = []
    for end in ends:
        result += [*range(start + length, end, length), end]
        start = end
    return result


def cut_document(start: int, ends: list[int], length: int, kind: str, rng: random.Random) -> Iterator[Row]:
    """Samples of the document of tokens `start` to `ends[-1]`, in the way of Devlin et al. 2018.

    Sentences are gathered until they fill `length`, at least two of them, and a random sentence end divides them. For
    `nsp` half of the rows have no second segment, to get one from elsewhere: what would have been theirs starts the
    next sample, so that no text is lost. A lone sentence has no second segment, or for `sop` is divided in the middle.
    """
    i = 0
    while i < len(ends):
        j = i + 1
        while j < len(ends) and (j - i < 2 or ends[j - 1] - start < length):
            j += 1
        cut = i + rng.randint(1, max(1, j - i - 1))
        middle, end = ends[cut - 1], ends[j - 1]
        if kind == "sop":
            middle = middle if middle < end else (start + end) // 2
        elif middle == end or rng.random() < 0.5:
            j, end = cut, middle
        if middle > start:
            yield start, middle, end
        i, start = j, ends[j - 1]


def cut_stream(documents: Iterable[tuple[int, int]], length: int) -> Iterator[list[Row]]:
    """Samples of documents of tokens `start` to `end`, one after the other, with a [SEP] wherever one ends.

    Each sample but the last is full: it ends within a sentence, and the next one goes on from there.
    """
    first, last, left = -1, 0, length
    for start, end in documents:
        while start < end:
            # A started sample needs one more [SEP] before the next document.
            left -= first >= 0
            first = start if first < 0 else first
            taken = min(left, end - start)
            start, left = start + taken, left - taken
            last = start if taken else last
            if left <= 1:
                yield [(first, last, last)]
                first, left = -1, length
    if first >= 0:
        yield [(first, last, last)]
