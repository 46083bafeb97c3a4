"""Tokenized text on disk: the folder that prepare.py writes and training maps into memory.

    preparation.json        what is prepared from what: written first, and compared when a preparation goes on
    tokenizer/              the tokenizer, as `AutoTokenizer` loads it
    shards/00000/           one for each piece of the source, complete from the moment that it has this name
        tokens.npy          token ids of all sentences, one after the other; no special tokens
        sentences.npy       token where each sentence ends
        documents.npy       for each document the sentence and the token where it ends, and a hash of its text
        counts.json
    duplicates.npy          documents whose text came before
    samples/128-nsp-x1/     which tokens make a sample of this kind: see samples.py. One text serves many kinds
    manifest.json           counts and file sizes of all shards: written last

Arrays are plain `.npy` files, so numpy can look at them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ENDS = np.dtype("<u4")
DOCUMENT = np.dtype([("sentence", "<u4"), ("token", "<u4"), ("digest", "<u8")])
DUPLICATE = np.dtype([("shard", "<u4"), ("document", "<u4")])
_ARRAYS = ("tokens", "sentences", "documents")
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a shard holds."""

    documents: int
    sentences: int
    tokens: int
    text_bytes: int
    files: dict[str, int]
    """Bytes of each file."""


def digest(text: str) -> int:
    """64 bits of a text. Among a hundred million documents two different ones are taken for equal in 1 run of 3,700."""
    return int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "little")


class ArrayFile:
    """A one-dimensional `.npy` file written from start to end, however long it becomes, in little memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = path.open("wb")
        self._dtype = dtype
        self._buffer = bytearray()
        self.length = 0
        self._file.write(self._header())

    def append(self, values: np.ndarray) -> None:
        """Adds `values` [N] at the end."""
        self._buffer += np.ascontiguousarray(values, self._dtype).tobytes()
        self.length += len(values)
        if len(self._buffer) >= _CHUNK_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes what is left, and the length into the header; numpy's headers leave room for any."""
        self._flush()
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._buffer)
        self._buffer.clear()

    def _header(self) -> bytes:
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (self.length,)})
        return header.getvalue()


class ShardWriter:
    """Writes a shard beside its place; leaving the `with` block without an error moves it there as a whole."""

    def __init__(self, place: Path, vocabulary_size: int) -> None:
        self._place = place
        self._aside = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        types = (np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4"), ENDS, DOCUMENT)
        self._arrays = {name: ArrayFile(self._aside / f"{name}.npy", dtype) for name, dtype in zip(_ARRAYS, types)}
        self._text_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, text: str, sentences: list[list[int]]) -> None:
        """Adds a document: its text and the token ids of its sentences, none of them empty."""
        tokens, ends, documents = (self._arrays[name] for name in _ARRAYS)
        start = tokens.length
        tokens.append(np.array(list(chain.from_iterable(sentences)), np.uint32))
        if tokens.length > np.iinfo(ENDS).max:
            raise ValueError(
                f"shard {self._place.name}: its piece of the source has over 4 billion tokens; split the file"
            )
        ends.append(start + np.cumsum([len(sentence) for sentence in sentences]))
        documents.append(np.array([(ends.length, tokens.length, digest(text))], DOCUMENT))
        self._text_bytes += len(text.encode())

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for array in self._arrays.values():
            array.close()
        if kind is not None:
            shutil.rmtree(self._aside)
            return
        tokens, sentences, documents = (self._arrays[name].length for name in _ARRAYS)
        sizes = {f"{name}.npy": (self._aside / f"{name}.npy").stat().st_size for name in _ARRAYS}
        counts = Counts(
            documents=documents, sentences=sentences, tokens=tokens, text_bytes=self._text_bytes, files=sizes
        )
        write_json(self._aside / "counts.json", asdict(counts))
        os.replace(self._aside, self._place)
        sync(self._place.parent)


@dataclass(slots=True)
class Corpus:
    """A finished preparation. Arrays are mapped when they are first used, in each process by itself."""

    folder: Path
    held_out: float
    shards: list[Counts]
    _open: dict[tuple[int, str], np.ndarray] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Raises ValueError for what is no finished preparation, and for a file that is missing or has another size."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            what = "its preparation has not ended" if (folder / "preparation.json").is_file() else "there is none"
            raise ValueError(f"{folder}: expected a folder that prepare.py wrote, but {what}; run prepare.py (again)")
        content = json.loads(manifest.read_text(encoding="utf-8"))
        shards = [Counts(**counts) for counts in content["shards"]]
        for number, counts in enumerate(shards):
            check_sizes(shard_path(folder, number), counts.files)
        check_sizes(folder, content["files"])
        return cls(folder, content["held_out"], shards)

    def array(self, shard: int, name: str) -> np.ndarray:
        """`tokens`, `sentences` or `documents` of a shard, mapped."""
        return self._mapped(shard, name, shard_path(self.folder, shard) / f"{name}.npy")

    def live(self, shard: int, split: str) -> np.ndarray:
        """bool [documents]: those of `train` or `held_out`, without duplicates.

        A text's hash says which it is, so equal texts never are in both, and the next source splits as this one.
        """
        documents = self.array(shard, "documents")
        held_out = documents["digest"] < np.uint64(self.held_out * 2.0**64)
        live: np.ndarray = held_out if split == "held_out" else ~held_out
        live[self.duplicates(shard)] = False
        return live

    def duplicates(self, shard: int) -> np.ndarray:
        """Numbers of a shard's documents that are duplicates."""
        found = self._mapped(-1, "duplicates", self.folder / "duplicates.npy")
        first, last = np.searchsorted(found["shard"], [shard, shard + 1])
        return found["document"][first:last]

    def _mapped(self, shard: int, name: str, path: Path) -> np.ndarray:
        key = (shard, name)
        if key not in self._open:
            self._open[key] = np.load(path, mmap_mode="r")
        return self._open[key]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself: a pickled map would be a copy of the data.
        return Corpus, (self.folder, self.held_out, self.shards)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies in a preparation."""
    return folder / "shards" / f"{number:05}"


def read_counts(shard: Path) -> Counts:
    """What a shard says of itself. Raises OSError where there is none."""
    return Counts(**json.loads((shard / "counts.json").read_text(encoding="utf-8")))


def check_sizes(folder: Path, files: dict[str, int]) -> None:
    """Raises ValueError that names the first of `files` which is missing or has another size."""
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            is_what = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise ValueError(
                f"{path} {is_what}: copy the data again, or run prepare.py again, which makes what is missing"
            )


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file aside, then under its name."""
    with written_whole(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` at the end: nobody ever sees half a file there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield aside
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Has a file or folder on the disk before anything that follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
