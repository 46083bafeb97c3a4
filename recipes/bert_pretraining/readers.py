"""Documents of local files and hub data sets, a part at a time: some bytes of a file, some row groups, or a shard.

Everything is read as a stream, so that memory does not grow with a file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

COMPRESSED = (".gz", ".bz2", ".zst")
Named = tuple[str, str]
"""A document's name, which says where it stands, and its text. Blank lines separate its paragraphs."""


def read_text(path: str, start: int, end: int | None) -> Iterator[Named]:
    """Documents of a text file, separated by blank lines; each of its lines becomes a paragraph.

    Read are those that follow a blank line which begins within bytes `start` to `end` (None: the end of the file), and
    with `start` 0 the first one.
    """
    lines: list[str] = []
    name, ours = f"{path}:0", start == 0
    for offset, line in _lines(path, start):
        if line.strip():
            if ours:
                name = name if lines else f"{path}:{offset}"
                lines.append(line.strip())
            continue
        if lines:
            yield name, "\n\n".join(lines)
            lines = []
        ours = end is None or offset < end
        if not ours:
            return
    if lines:
        yield name, "\n\n".join(lines)


def read_records(path: str, start: int, end: int | None, text_column: str) -> Iterator[Named]:
    """The records of a JSONL file whose lines begin within bytes `start` to `end`."""
    for offset, line in _lines(path, start):
        if end is not None and offset >= end:
            return
        if line.strip():
            yield _record(json.loads(line), f"{path}:{offset}", text_column)


def read_parquet(path: str, start: int, end: int | None, text_column: str) -> Iterator[Named]:
    """The records of row groups `start` to `end` of a parquet file."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if text_column not in file.schema_arrow.names:
            _record(dict.fromkeys(file.schema_arrow.names), path, text_column)
        groups = list(range(start, file.num_row_groups if end is None else end))
        number = 0
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_column]):
            for record in batch.to_pylist():
                yield _record(record, f"{path}:{start}:{number}", text_column)
                number += 1


def read_hub(name: str, start: int, end: int | None, text_column: str) -> Iterator[Named]:
    """The records of shard `start` of the train split of `name` or `name:configuration`, which has `end` shards."""
    shard = hub_stream(name).shard(num_shards=end, index=start)
    for number, record in enumerate(shard):
        yield _record(record, f"{name}:{start}:{number}", text_column)


def hub_stream(name: str) -> Any:
    """The train split of a hub data set, read as it is downloaded."""
    from datasets import load_dataset

    return load_dataset(*name.split(":", 1), split="train", streaming=True)


def _lines(path: str, start: int) -> Iterator[tuple[int, str]]:
    """Lines that begin at byte `start` or later, each with the byte where it begins."""
    with _open(path) as file:
        offset = 0
        if start:
            # The line in which `start` falls belongs to the part before, unless it begins right there.
            file.seek(start - 1)
            offset = start - 1 + len(file.readline())
        for line in file:
            yield offset, line.decode("utf-8")
            offset += len(line)


def _open(path: str) -> BinaryIO:
    if not path.endswith(COMPRESSED):
        return open(path, "rb")
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(path, compression="detect")))


def _record(record: object, name: str, text_column: str) -> Named:
    text = record.get(text_column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is not a record"
        raise ValueError(f"{name}: no text under {text_column!r}; {fields}. Name the field with --text-column")
    return name, text
