"""Text to pretrain on, as documents and sentences.

A source is one of
- `python-docs`: the prose that every Python carries, about 300,000 words: its language reference and the docstrings of
  its standard library. Nothing is downloaded and no library module is imported: the sources are only parsed.
- a file or folder: `.txt` as BERT's authors had it (a sentence or paragraph a line, a blank line between documents),
  `.jsonl` or `.parquet` (a document a record);
- the name of a data set on the hub, `name` or `name:configuration`, of which the `train` split is read.

    python corpus.py python-docs        # counts documents, sentences and words, and shows some
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PYTHON_DOCS = "python-docs"
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "encodings"}
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"""(?:[.!?]["')\]]*|:)\s+(?=["'(\[`*]*[A-Z])""")
_WORD = re.compile(r"[A-Za-z][a-z]+|[aAI]")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that stands for itself. Blank lines separate its paragraphs."""

    name: str
    text: str


def read_documents(source: str, text_column: str = "text") -> Iterator[Document]:
    """The documents of a source, always in the same order; of equal texts only the first.

    `text_column` is the field that holds the text in JSONL, parquet and hub data sets. Raises ValueError for a source
    that does not exist, holds no text files, or lacks that field.
    """
    seen: set[bytes] = set()
    for document in _read(source, text_column):
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            yield document


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, each on one line. A blank line always ends a sentence."""
    sentences = []
    for paragraph in _PARAGRAPH_END.split(text):
        line = " ".join(paragraph.split())
        start = 0
        for end in _SENTENCE_END.finditer(line):
            sentences.append(line[start : end.end()].strip())
            start = end.end()
        sentences.append(line[start:].strip())
    return [s for s in sentences if s]


def _read(source: str, text_column: str) -> Iterator[Document]:
    path = Path(source)
    if source == PYTHON_DOCS:
        return _python_docs()
    if path.exists():
        return _local(path, text_column)
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        raise ValueError(f"source {source!r}: there is no such file or folder")
    name, _, configuration = source.partition(":")
    return _data_set(source, text_column, name, *filter(None, [configuration]))


def _local(path: Path, text_column: str) -> Iterator[Document]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
    if not files or any(p.suffix not in _SUFFIXES for p in files):
        raise ValueError(f"source {str(path)!r}: expected {', '.join(_SUFFIXES)}, or a folder that holds such files")
    for file in files:
        if file.suffix == ".parquet":
            yield from _data_set(str(file), text_column, "parquet", data_files=str(file))
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    if line.strip():
                        yield _record(json.loads(line), f"{file}:{number}", text_column)
        else:
            for number, text in enumerate(_PARAGRAPH_END.split(file.read_text(encoding="utf-8"))):
                # A line end is a sentence end here, with or without a full stop.
                yield Document(f"{file}:{number}", text.strip().replace("\n", "\n\n"))


def _data_set(name: str, text_column: str, *which: str, **options: str) -> Iterator[Document]:
    # Imported here: the other sources need nothing beyond Python.
    from datasets import load_dataset

    for number, record in enumerate(load_dataset(*which, split="train", streaming=True, **options)):
        yield _record(record, f"{name}:{number}", text_column)


def _record(record: object, name: str, text_column: str) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get(text_column), str):
        fields = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is not a record"
        raise ValueError(f"{name}: no text under {text_column!r}; {fields}. Name the field with --text-column")
    return Document(name, record[text_column])


def _python_docs() -> Iterator[Document]:
    """The topics of `help()`, then one document a library module: its docstrings from top to bottom.

    Paragraphs that are code, tables or grammar are left out, and so is a paragraph that came before: the library
    repeats itself (`decimal` and `_pydecimal`), and a repeated one could end up in training and in the held-out part.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        yield Document(f"topic:{name}", _new_prose(topics[name], seen))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(relative.parts):
            yield Document(f"module:{relative.as_posix()}", _new_prose("\n\n".join(_docstrings(path)), seen))


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            # Old library code has escapes that newer Pythons warn about; that is not the reader's concern.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    # ast.walk goes level by level; line numbers restore the order in which a reader meets the texts.
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _new_prose(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in _PARAGRAPH_END.split(text):
        flat = " ".join(paragraph.split())
        if flat not in seen and _is_prose(flat):
            seen.add(flat)
            kept.append(flat)
    return "\n\n".join(kept)


def _is_prose(paragraph: str) -> bool:
    """True for at least three words that make up most of the paragraph, and no interpreter prompt."""
    words = _WORD.findall(paragraph)
    return len(words) >= 3 and ">>>" not in paragraph and sum(map(len, words)) >= 0.6 * len(paragraph.replace(" ", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--text-column", default="text")
    args = parser.parse_args()
    documents = list(read_documents(args.source, args.text_column))
    sentences = [s for d in documents for s in split_sentences(d.text)]
    words = sum(len(s.split()) for s in sentences)
    print(f"{len(documents):,} documents, {len(sentences):,} sentences, {words:,} words. Some of them:")
    for sentence in sentences[:: max(1, len(sentences) // 10)]:
        print(" ", sentence)


if __name__ == "__main__":
    main()
