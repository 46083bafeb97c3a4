"""Reads samples from a prepared folder: the rows that cutting.py wrote, and the tokens they point to."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cutting import SPLITS, room, rows_name, samples_folder
from settings import DataSettings
from shards import Corpus, check_sizes

IS_NEXT, IS_RANDOM = 0, 1
"""Labels of `nsp`, as `BertForPreTraining` has them."""

IN_ORDER, SWAPPED = 0, 1
"""Labels of `sop`, as `AlbertForPreTraining` has them."""

_SEGMENTS = 1
"""Keeps the random numbers that make segments apart from those of the masks."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample without special tokens: what a mask is then put on."""

    number: int
    epoch: int
    segments: list[np.ndarray]
    """Two for `nsp` and `sop`; for `none` one for each document that has a part in the sample."""

    label: int | None


@dataclass(slots=True)
class SampleReader:
    """The samples of one split, by number. Raises ValueError where rows for the settings are missing or incomplete."""

    folder: Path
    settings: DataSettings
    split: str
    seed: int
    corpus: Corpus = field(init=False, repr=False)
    _samples_before: np.ndarray = field(init=False, repr=False)
    _sentences_before: np.ndarray = field(init=False, repr=False)
    _rows: dict[int, np.ndarray] = field(init=False, repr=False, default_factory=dict)
    _live: dict[int, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        assert self.split in SPLITS
        self.corpus = Corpus.load(self.folder)
        rows = samples_folder(self.folder, self.settings)
        if not (rows / "manifest.json").is_file():
            raise ValueError(
                f"{rows} is not there or not complete: run prepare.py with this config and the same --output; "
                "the text is not read again"
            )
        manifest = json.loads((rows / "manifest.json").read_text(encoding="utf-8"))
        check_sizes(rows, manifest["files"])
        self._samples_before = np.cumsum([0, *manifest["samples"][self.split]])
        self._sentences_before = np.cumsum([0, *(counts.sentences for counts in self.corpus.shards)])

    def __len__(self) -> int:
        return int(self._samples_before[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        # As for Corpus: a worker process maps the files itself.
        return SampleReader, (self.folder, self.settings, self.split, self.seed)

    def read(self, number: int, epoch: int) -> Sample:
        """A sample as it is in an epoch. It depends on the arguments and the seed alone."""
        shard = int(np.searchsorted(self._samples_before, number, "right")) - 1
        start, middle, end = self._row(shard, number - int(self._samples_before[shard]))
        if self.settings.next == "none":
            return Sample(number, epoch, self._parts(shard, start, end), None)
        rng = np.random.default_rng((self.seed, epoch, number, _SEGMENTS))
        tokens = self.corpus.array(shard, "tokens")
        first, second = tokens[start:middle], tokens[middle:end]
        if self.settings.next == "sop":
            label = int(rng.integers(2))
            segments = [second, first] if label == SWAPPED else [first, second]
        else:
            label = IS_NEXT if len(second) else IS_RANDOM
            segments = [first, second if len(second) else self._partner(shard, start, len(first), rng)]
        return Sample(number, epoch, shortened(segments, room(self.settings), rng), label)

    def _row(self, shard: int, row: int) -> tuple[int, int, int]:
        if shard not in self._rows:
            path = samples_folder(self.folder, self.settings) / rows_name(self.split, shard)
            self._rows[shard] = np.load(path, mmap_mode="r")
        start, middle, end = self._rows[shard][row].tolist()
        return start, middle, end

    def _parts(self, shard: int, start: int, end: int) -> list[np.ndarray]:
        """The tokens of live documents within `start` to `end`, an array a document."""
        ends, tokens = self.corpus.array(shard, "documents")["token"], self.corpus.array(shard, "tokens")
        parts = []
        document = bisect_right(ends, start)
        while start < end:
            stop = min(int(ends[document]), end)
            if self._is_live(shard, document):
                parts.append(tokens[start:stop])
            start, document = stop, document + 1
        return parts

    def _partner(self, shard: int, start: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Tokens from a random sentence on, as many as fit beside `length` or half a sample, of another document."""
        wanted = max(room(self.settings) - length, room(self.settings) // 2)
        own = (shard, bisect_right(self.corpus.array(shard, "documents")["token"], start))
        while True:
            sentence = int(rng.integers(self._sentences_before[-1]))
            other = int(np.searchsorted(self._sentences_before, sentence, "right")) - 1
            sentence -= int(self._sentences_before[other])
            documents = self.corpus.array(other, "documents")
            document = bisect_right(documents["sentence"], sentence)
            if (other, document) != own and self._is_live(other, document):
                break
        ends = self.corpus.array(other, "sentences")
        begin = int(ends[sentence - 1]) if sentence else 0
        return self.corpus.array(other, "tokens")[begin : min(begin + wanted, int(documents["token"][document]))]

    def _is_live(self, shard: int, document: int) -> bool:
        if shard not in self._live:
            self._live[shard] = np.packbits(self.corpus.live(shard, self.split))
        return bool(self._live[shard][document >> 3] >> (7 - (document & 7)) & 1)


def shortened(segments: list[np.ndarray], length: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Two segments, cut until both fit into `length`.

    As in BERT tokens go from the longer one, from either end, so that no position is special.
    """
    first, second = (len(segment) for segment in segments)
    if first + second <= length:
        return segments
    half = length // 2
    first = min(first, max(length - second, length - half))
    kept = (first, min(second, length - first))
    result = []
    for segment, rest in zip(segments, kept):
        start = int(rng.binomial(len(segment) - rest, 0.5))
        result.append(segment[start : start + rest])
    return result
