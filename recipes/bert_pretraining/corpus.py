"""Text to pretrain on, as documents.

A source is one of
- `python-docs`: the prose that every Python carries, see python_docs.py;
- a file, a folder or a pattern such as `data/**/*.jsonl.gz`: `.txt` as BERT's authors had it (a sentence or paragraph a
  line, a blank line between documents), `.jsonl` (a document a record), both also as `.gz`, `.bz2` or `.zst`, and
  `.parquet`;
- the name of a data set on the hub, `name` or `name:configuration`, of which the `train` split is streamed.

    python corpus.py python-docs        # counts documents, sentences and words, and shows some
"""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from python_docs import python_docs
from readers import COMPRESSED, Named, hub_stream, read_hub, read_parquet, read_records, read_text
from sentences import split_sentences

PYTHON_DOCS = "python-docs"
PIECE_BYTES = 64_000_000
_KINDS = {".txt": "text", ".jsonl": "records", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Document:
    """A text that stands for itself. Blank lines separate its paragraphs."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one process reads at a time: part of a file, a whole compressed file, or a shard of a hub data set."""

    kind: str
    name: str
    text_column: str
    start: int = 0
    end: int | None = None
    """First unit, and the one after the last: bytes, row groups or shards. None: to the end."""

    size: int = 0
    """Bytes on disk; 0 where that is not known."""

    def documents(self) -> Iterator[Document]:
        """Its documents, always in the same order, without blank ones."""
        readers: dict[str, Callable[[], Iterator[Named]]] = {
            PYTHON_DOCS: python_docs,
            "text": lambda: read_text(self.name, self.start, self.end),
            "records": lambda: read_records(self.name, self.start, self.end, self.text_column),
            "parquet": lambda: read_parquet(self.name, self.start, self.end, self.text_column),
            "hub": lambda: read_hub(self.name, self.start, self.end, self.text_column),
        }
        return (Document(name, text) for name, text in readers[self.kind]() if text.strip())


def find_pieces(sources: Sequence[str], text_column: str = "text", piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The pieces of the sources, of about `piece_bytes` where a file can be entered in the middle, in a fixed order.

    `text_column` is the field that holds the text in JSONL, parquet and hub data sets. Raises ValueError for a source
    that does not exist or holds no text files.
    """
    return [piece for source in sources for piece in _pieces(source, text_column, piece_bytes)]


def read_documents(*sources: str, text_column: str = "text") -> Iterator[Document]:
    """All documents of the sources, one after the other."""
    for piece in find_pieces(sources, text_column):
        yield from piece.documents()


def _pieces(source: str, text_column: str, piece_bytes: int) -> Iterator[Piece]:
    path = Path(source)
    if source == PYTHON_DOCS:
        yield Piece(kind=PYTHON_DOCS, name=source, text_column=text_column)
    elif path.is_file() or path.is_dir() or glob.has_magic(source):
        for file in _files(source):
            yield from _file_pieces(file, text_column, piece_bytes)
    elif _kind(source) or source.startswith((".", "/", "~")):
        raise ValueError(f"source {source!r}: there is no such file or folder")
    else:
        shards = hub_stream(source).num_shards
        for shard in range(shards):
            yield Piece(kind="hub", name=source, text_column=text_column, start=shard, end=shards)


def _files(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if _kind(p.name) and p.is_file())
    else:
        files = (
            [source] if path.is_file() else sorted(f for f in glob.glob(source, recursive=True) if Path(f).is_file())
        )
    if not files or not all(_kind(file) for file in files):
        raise ValueError(
            f"source {source!r}: expected {', '.join(_KINDS)} ({', '.join(COMPRESSED)} may follow the first two), or a "
            "folder or pattern for such files"
        )
    return files


def _kind(name: str) -> str | None:
    """How a file is read, by its name."""
    stem, last = os.path.splitext(name)
    if last in COMPRESSED and not stem.endswith(".parquet"):
        last = os.path.splitext(stem)[1]
    return _KINDS.get(last)


def _file_pieces(path: str, text_column: str, piece_bytes: int) -> Iterator[Piece]:
    kind, size = _kind(path), os.path.getsize(path)
    assert kind is not None
    if path.endswith(COMPRESSED):
        yield Piece(kind=kind, name=path, text_column=text_column, size=size)
        return
    ends = _row_group_ends(path, piece_bytes) if kind == "parquet" else _byte_ends(size, piece_bytes)
    for start, (end, part) in zip([0, *(end for end, _ in ends)], ends):
        yield Piece(kind=kind, name=path, text_column=text_column, start=start, end=end, size=part)


def _byte_ends(size: int, piece_bytes: int) -> list[tuple[int, int]]:
    """End and size of parts as equal as can be."""
    parts = max(1, round(size / piece_bytes))
    ends = [size * (i + 1) // parts for i in range(parts)]
    return [(end, end - start) for start, end in zip([0, *ends], ends)]


def _row_group_ends(path: str, piece_bytes: int) -> list[tuple[int, int]]:
    """Ends of parts of neighbouring row groups, as few as give `piece_bytes` or more, and their sizes."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    ends, size = [], 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            ends.append((group + 1, size))
            size = 0
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+")
    parser.add_argument("--text-column", default="text")
    args = parser.parse_args()
    documents, sentences, words = 0, 0, 0
    examples: list[str] = []
    for document in read_documents(*args.source, text_column=args.text_column):
        found = split_sentences(document.text)
        documents += 1
        sentences += len(found)
        words += sum(len(s.split()) for s in found)
        if len(examples) < 10:
            examples += found[:1]
    print(f"{documents:,} documents, {sentences:,} sentences, {words:,} words. The first sentences of some:")
    for sentence in examples:
        print(" ", sentence)


if __name__ == "__main__":
    main()
