"""Tokenizes documents and cuts them into samples: a folder that training maps into memory, laid out as shards.py says.

    python prepare.py --config configs/demo.json --source python-docs --tokenizer runs/demo/tokenizer \\
        --output runs/demo/data

Runs on all cores and in little memory, however large the source. Where it was stopped it goes on when it is started
again with the same arguments. The text is tokenized once for all phases of the config; with the same output and another
config, only its samples are cut.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from corpus import PIECE_BYTES, Document, Piece, find_pieces
from cutting import SPLITS, cut_shard, rows_name, samples_folder
from duplicates import write_duplicates
from encoding import Encode, load_encoder
from processes import in_processes
from samples import SampleReader
from sentences import split_sentences
from settings import DataSettings, Recipe
from shards import Corpus, ShardWriter, check_sizes, read_counts, shard_path, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 1 << 18
FORMAT = 1


def prepare(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    phases: Sequence[DataSettings],
    output: Path,
    *,
    text_column: str = "text",
    workers: int = 1,
    piece_bytes: int = PIECE_BYTES,
) -> Corpus:
    """Prepares the sources in the folder `output` for the phases of a training, or does what is left to do there.

    Equal arguments give equal files, whatever `workers` is and however often the work was interrupted. Raises
    ValueError where `output` has another preparation, where another process is at work on it, and for a source with too
    few documents for two splits.
    """
    pieces = find_pieces(sources, text_column, piece_bytes)
    held_out = phases[0].held_out
    with _begun(output, tokenizer, held_out, pieces):
        left = [(number, piece) for number, piece in enumerate(pieces) if not _is_done(output, number)]
        if left:
            (output / "manifest.json").unlink(missing_ok=True)
        for _ in in_processes(partial(_make_shard, output), left, workers, "tokenizing"):
            pass
        if not (output / "manifest.json").is_file():
            finish(output, held_out, len(pieces))
        corpus = Corpus.load(output)
        for settings in phases:
            cut_samples(corpus, settings, workers)
    return corpus


@contextmanager
def _begun(output: Path, tokenizer: PreTrainedTokenizerBase, held_out: float, pieces: list[Piece]) -> Iterator[None]:
    """Locks the folder and writes what is to be prepared there, or checks that it is the same."""
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        what = {
            "format": FORMAT,
            "held_out": held_out,
            "tokenizer": _fingerprint(Path(saved)),
            "pieces": [asdict(piece) for piece in pieces],
        }
        path = output / "preparation.json"
        if not path.is_file():
            write_json(path, what)
        with path.open() as file:
            _lock(file.fileno(), output)
            found = json.load(file)
            other = [key for key in what if found.get(key) != what[key]]
            if other:
                raise ValueError(
                    f"{output}: was prepared with other {', '.join(other)} (see {path.name} there); "
                    "name another --output or delete the folder"
                )
            _remove_rests(output)
            if not (output / "tokenizer").exists():
                aside = output / f".tokenizer.{os.getpid()}"
                shutil.copytree(saved, aside)
                os.replace(aside, output / "tokenizer")
            _encoder.cache_clear()
            yield


def _remove_rests(output: Path) -> None:
    """Removes what was being written when the preparation was stopped before."""
    for pattern in (".*", "shards/.*", "samples/*/.*"):
        for rest in output.glob(pattern):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink()


def _lock(handle: int, output: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{output}: another prepare.py is at work on this folder") from None


def _fingerprint(folder: Path) -> str:
    """A hash of a saved tokenizer, without the version of the library that saved it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name in ("tokenizer.json", "vocab.txt") or path.suffix in (".model", ".txt"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_done(output: Path, number: int) -> bool:
    """Whether a shard is whole; what is left of one that is not is removed."""
    place = shard_path(output, number)
    try:
        check_sizes(place, read_counts(place).files)
    except (ValueError, OSError):
        shutil.rmtree(place, ignore_errors=True)
        return False
    return True


def _make_shard(output: Path, job: tuple[int, Piece]) -> None:
    number, piece = job
    encode, vocabulary_size = _encoder(output / "tokenizer")
    with ShardWriter(shard_path(output, number), vocabulary_size) as shard:
        for document, sentences in _tokenized(piece.documents(), encode):
            if sum(map(len, sentences)) > 1:
                shard.add(document.text, sentences)


@cache
def _encoder(folder: Path) -> tuple[Encode, int]:
    return load_encoder(folder)


def _tokenized(documents: Iterator[Document], encode: Encode) -> Iterator[tuple[Document, list[list[int]]]]:
    """Documents with the ids of their sentences. Some are tokenized together, since that is faster."""
    batch: list[tuple[Document, list[str]]] = []
    characters = 0
    for document in documents:
        batch.append((document, split_sentences(document.text)))
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from _encoded(batch, encode)
            batch, characters = [], 0
    yield from _encoded(batch, encode)


def _encoded(batch: list[tuple[Document, list[str]]], encode: Encode) -> Iterator[tuple[Document, list[list[int]]]]:
    ids = iter(encode([sentence for _, sentences in batch for sentence in sentences]))
    for document, sentences in batch:
        yield document, [found for _, found in zip(sentences, ids) if found]


def finish(output: Path, held_out: float, shards: int) -> None:
    """Finds duplicates and writes the manifest, which makes the folder a whole."""
    write_duplicates(output, shards)
    counts = [asdict(read_counts(shard_path(output, number))) for number in range(shards)]
    totals = {name: sum(c[name] for c in counts) for name in ("documents", "sentences", "tokens", "text_bytes")}
    files = {"duplicates.npy": (output / "duplicates.npy").stat().st_size}
    # What was cut before belongs to other shards.
    shutil.rmtree(output / "samples", ignore_errors=True)
    write_json(
        output / "manifest.json",
        {"format": FORMAT, "held_out": held_out, **totals, "files": files, "shards": counts},
    )


def cut_samples(corpus: Corpus, settings: DataSettings, workers: int) -> None:
    """Cuts the samples of all shards, or of those that were not cut yet."""
    folder = samples_folder(corpus.folder, settings)
    if (folder / "manifest.json").is_file():
        return
    _check_documents(corpus)
    numbers = range(len(corpus.shards))
    left = [n for n in numbers if not (folder / rows_name(SPLITS[-1], n)).is_file()]
    # Cutting needs no counts: with them each shard's job would carry those of all.
    plain = Corpus(corpus.folder, corpus.held_out, [])
    for _ in in_processes(partial(cut_shard, plain, settings), left, workers, "cutting samples"):
        pass
    names = [rows_name(split, number) for split in SPLITS for number in numbers]
    samples = {split: [len(np.load(folder / rows_name(split, n), mmap_mode="r")) for n in numbers] for split in SPLITS}
    files = {name: (folder / name).stat().st_size for name in names}
    write_json(folder / "manifest.json", {"samples": samples, "files": files})


def _check_documents(corpus: Corpus) -> None:
    counts = {split: sum(int(corpus.live(n, split).sum()) for n in range(len(corpus.shards))) for split in SPLITS}
    if min(counts.values()) < 2:
        raise ValueError(
            f"{corpus.folder}: of the documents {counts['train']} are for training and {counts['held_out']} held out "
            f"with held_out={corpus.held_out}; each part needs two, to draw random partners from"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="change the config")
    parser.add_argument("--source", required=True, nargs="+", help="see corpus.py")
    parser.add_argument("--text-column", default="text", help="field that holds the text")
    parser.add_argument("--tokenizer", required=True, help="folder that train_tokenizer.py wrote, or a name on the hub")
    parser.add_argument(
        "--output", required=True, type=Path, help="folder for the data; the tokenizer is copied into it"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    parser.add_argument("--piece-megabytes", type=int, default=PIECE_BYTES // 1_000_000, help="text that a shard holds")
    args = parser.parse_args()
    # Imported here: the processes that tokenize import this file, and most need no Transformers.
    from transformers import AutoTokenizer

    phases = [phase.data for phase in Recipe.load(args.config, args.set).phases()]
    corpus = prepare(
        args.source,
        AutoTokenizer.from_pretrained(args.tokenizer),
        phases,
        args.output,
        text_column=args.text_column,
        workers=args.workers,
        piece_bytes=args.piece_megabytes * 1_000_000,
    )
    print(report(corpus, phases))


def report(corpus: Corpus, phases: Sequence[DataSettings]) -> str:
    """What a preparation has: a line for the text and one for the samples of each phase."""
    documents, tokens = (sum(getattr(counts, name) for counts in corpus.shards) for name in ("documents", "tokens"))
    repeated = sum(len(corpus.duplicates(number)) for number in range(len(corpus.shards)))
    lines = [f"{corpus.folder}: {documents:,} documents ({repeated:,} of them duplicates), {tokens:,} tokens"]
    for settings in phases:
        train, held_out = (len(SampleReader(corpus.folder, settings, split, 0)) for split in SPLITS)
        lines.append(f"  {train:,} train, {held_out:,} held-out samples of up to {settings.sequence_length} tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
