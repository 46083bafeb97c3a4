"""Finds documents whose text came before, in as much memory as is given to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shards import DUPLICATE, ArrayFile, shard_path, written_whole

_AT_A_TIME = 8_000_000
"""Documents compared at a time: about half a gigabyte."""


def write_duplicates(folder: Path, shards: int, at_a_time: int = _AT_A_TIME) -> None:
    """Writes `duplicates.npy`: shard and document of each that has the hash of one in front of it, in order.

    The hashes are compared in as many rounds as are needed, each for an equal share of their values: equal hashes
    meet in the same one. Only what is found is held over all of them, 8 bytes a duplicate.
    """
    total = sum(len(_documents(folder, shard)) for shard in range(shards))
    rounds = -(-total // at_a_time) or 1
    found = [_duplicates_of(_hashes(folder, shards, rounds, number)) for number in range(rounds)]
    with written_whole(folder / "duplicates.npy") as path:
        file = ArrayFile(path, DUPLICATE)
        file.append(np.sort(np.concatenate(found), order=["shard", "document"]))
        file.close()


def _documents(folder: Path, shard: int) -> np.ndarray:
    documents: np.ndarray = np.load(shard_path(folder, shard) / "documents.npy", mmap_mode="r")
    return documents


def _hashes(folder: Path, shards: int, rounds: int, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for shard in range(shards):
        digests = _documents(folder, shard)["digest"]
        (here,) = np.nonzero(digests % np.uint64(rounds) == number)
        places = np.empty(len(here), DUPLICATE)
        places["shard"], places["document"] = shard, here
        yield digests[here], places


def _duplicates_of(hashes: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Places of all but the first with each hash."""
    parts = list(hashes)
    digests = np.concatenate([d for d, _ in parts])
    # Stable: of equal ones the first in the source stays the first.
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    again = order[1:][digests[1:] == digests[:-1]]
    repeated: np.ndarray = np.concatenate([p for _, p in parts])[again]
    return repeated
