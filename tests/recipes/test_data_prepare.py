"""Preparation: killed and resumed, without duplicates, in flat memory, and checked when it is loaded."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import json
import shutil
import subprocess
import sys
import time
from itertools import cycle, islice

import numpy as np
import psutil
import pytest
from corpus import find_pieces
from data import training_loader
from duplicates import write_duplicates
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare import finish, prepare
from sentences import split_sentences
from settings import DataSettings
from shards import Corpus, ShardWriter, shard_path

PIECE_BYTES = 15_000
# As a program of its own, which can be killed and has a peak of memory. Transformers is not needed to prepare.
CHILD = """
import shutil, sys
from pathlib import Path
import prepare
from settings import DataSettings

class Tokenizer:
    def save_pretrained(self, folder):
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)

# So small that even the smallest corpus fills some.
prepare._BATCH_CHARACTERS = 1 << 15
folder, tokenizer, workers, piece_bytes, *sources = sys.argv[1:]
for number, source in enumerate(sources):
    output = Path(folder, str(number))
    settings = [DataSettings(sequence_length=length, held_out=0.1) for length in (32, 64)]
    prepare.prepare([source], Tokenizer(), settings, output, workers=int(workers), piece_bytes=int(piece_bytes))
    # Not getrusage: its peak is that of the process which started this one, if that had more.
    print("peak", Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def start(recipe_folder, *arguments):
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, cwd=recipe_folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def phases():
    return [DataSettings(sequence_length=length, held_out=0.1) for length in (32, 64)]


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """The tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source, tokenizer, phases, tmp_path_factory):
    """A preparation without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    prepare([source], tokenizer, phases, folder, piece_bytes=PIECE_BYTES)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_killed_preparation_goes_on_to_the_same_bytes(
    source, tokenizer, saved, phases, whole, recipe_folder, tmp_path
):
    child = start(recipe_folder, tmp_path, saved, 2, PIECE_BYTES, source)
    folder = tmp_path / "0"
    wait_until(lambda: child.poll() is not None or len(list(folder.glob("shards/0*"))) >= 3)
    helpers = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.communicate()
    assert len(helpers) >= 2
    wait_until(lambda: not any(helper.is_running() and helper.status() != "zombie" for helper in helpers))
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("shards/0*")}
    assert 3 <= len(done) < len(find_pieces([source], piece_bytes=PIECE_BYTES))
    with pytest.raises(ValueError, match="its preparation has not ended; run prepare"):
        Corpus.load(folder)
    # What is left of a shard that was being written, and one that lost its end, are made anew.
    (folder / "shards" / ".00004.123").mkdir()
    (folder / "samples" / "32-nsp-x1").mkdir(parents=True)
    (folder / "samples" / "32-nsp-x1" / ".train-00000.npy.123").touch()
    broken = min(done)
    (folder / "shards" / broken / "tokens.npy").write_bytes(b"")
    prepare([source], tokenizer, phases, folder, piece_bytes=PIECE_BYTES)
    assert contents(folder) == contents(whole)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shards/0*")}
    assert {name for name in done if kept[name] == done[name]} == set(done) - {broken}


def test_preparing_again_does_nothing_and_another_length_only_cuts(whole, source, tokenizer, phases):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    prepare([source], tokenizer, phases, whole, piece_bytes=PIECE_BYTES)
    longer = dataclasses.replace(phases[0], sequence_length=128)
    prepare([source], tokenizer, [longer], whole, piece_bytes=PIECE_BYTES)
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert {path.parent.name for path in after.keys() - before.keys()} == {"128-nsp-x1"}


def test_another_preparation_is_not_mixed_in(whole, source, tokenizer, phases, tmp_path):
    other = [dataclasses.replace(phase, held_out=0.2) for phase in phases]
    with pytest.raises(ValueError, match="was prepared with other held_out"):
        prepare([source], tokenizer, other, whole, piece_bytes=PIECE_BYTES)
    with pytest.raises(ValueError, match="was prepared with other pieces"):
        prepare([source], tokenizer, phases, whole, piece_bytes=2 * PIECE_BYTES)
    with (whole / "preparation.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="at work on this folder"):
            prepare([source], tokenizer, phases, whole, piece_bytes=PIECE_BYTES)
    assert not list(whole.rglob(".*"))
    lines = [{"text": f"Text {i}."} for i in range(3)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="each part needs two"):
        prepare([str(tmp_path / "few.jsonl")], tokenizer, phases, tmp_path / "few")


def test_memory_stays_flat_when_the_corpus_grows_tenfold(documents, saved, recipe_folder, tmp_path):
    """Also where all of it is one piece, as a compressed file is."""
    sentences = cycle([s for d in documents for s in split_sentences(d.text)])
    size = 300_000
    for name, times in (("small", 1), ("large", 10)):
        with gzip.open(tmp_path / f"{name}.txt.gz", "wt", compresslevel=1) as file:
            written = number = 0
            while written < times * size:
                # Numbered, so that they are no duplicates.
                number += 1
                written += file.write(f"Text {number}.\n" + "\n".join(islice(sentences, 10)) + "\n\n")
    child = start(recipe_folder, tmp_path, saved, 1, 1, tmp_path / "small.txt.gz", tmp_path / "large.txt.gz")
    output, error = child.communicate()
    assert child.returncode == 0, error
    small, large = (int(line.split()[1]) for line in output.splitlines() if line.startswith("peak"))
    corpora = [Corpus.load(tmp_path / number) for number in "01"]
    texts = [sum(counts.text_bytes for counts in corpus.shards) for corpus in corpora]
    assert texts[1] > 9 * texts[0]
    # Its text alone, held once, would be 3 MB; its tokens as Python's numbers many times that.
    assert large - small < 2000, f"{small} KiB, {large} KiB"


def write_shards(folder, shards):
    for number, texts in enumerate(shards):
        with ShardWriter(shard_path(folder, number), 100) as writer:
            for text in texts:
                writer.add(str(text), [[5, 6]])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=4), st.integers(1, 9))
def test_of_equal_documents_the_first_stays(tmp_path_factory, shards, at_a_time):
    folder = tmp_path_factory.mktemp("duplicates")
    write_shards(folder, shards)
    write_duplicates(folder, len(shards), at_a_time)
    found = np.load(folder / "duplicates.npy").tolist()
    seen, expected = set(), []
    for shard, texts in enumerate(shards):
        for document, text in enumerate(texts):
            if text in seen:
                expected.append((shard, document))
            seen.add(text)
    assert found == expected


def test_duplicates_are_in_no_sample(tmp_path, tokenizer, phases):
    phases = [dataclasses.replace(phase, held_out=0.4) for phase in phases]
    texts = [f"Text {i} has a number. It is {i}." for i in range(30)]
    for name, part in (("a", texts), ("b", [*texts[10:], "One more text. It is here."])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    corpus = prepare([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tokenizer, phases, tmp_path / "data")
    assert [len(corpus.duplicates(shard)) for shard in range(2)] == [0, 20]
    live = [corpus.live(1, split) for split in ("train", "held_out")]
    assert np.flatnonzero(live[0] | live[1]).tolist() == [20]


def test_damage_is_named(whole, source, tokenizer, phases, recipe, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(whole, folder)

    def load():
        own = dataclasses.replace(recipe, data=phases[0])
        next(iter(training_loader(folder, own, rank=0, ranks=1)))

    load()
    for name, wrong in [
        ("shards/00002/tokens.npy", "has 100 bytes instead of"),
        ("shards/00001/documents.npy", "is missing"),
        ("samples/32-nsp-x1/train-00003.npy", "is missing"),
        ("duplicates.npy", "has 100 bytes instead of"),
    ]:
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:100]) if "bytes" in wrong else path.unlink()
        with pytest.raises(ValueError, match=f"{name} {wrong}"):
            load()
        path.write_bytes(content)
    shutil.rmtree(folder / "samples" / "32-nsp-x1")
    with pytest.raises(ValueError, match="with this config and the same --output"):
        load()
    with pytest.raises(ValueError, match="wrote, but there is none"):
        Corpus.load(tmp_path)
    # Preparing again makes what is missing.
    shutil.rmtree(folder / "shards" / "00002")
    prepare([source], tokenizer, phases, folder, piece_bytes=PIECE_BYTES)
    shutil.rmtree(whole / "samples" / "128-nsp-x1", ignore_errors=True)
    assert contents(folder) == contents(whole)


def test_large_vocabularies_and_growing_files(tmp_path):
    rng = np.random.default_rng(0)
    documents = [[rng.integers(5, 70_000, 700).tolist() for _ in range(3)] for _ in range(400)]
    with ShardWriter(shard_path(tmp_path, 0), 70_000) as writer:
        for number, sentences in enumerate(documents):
            writer.add(str(number), sentences)
    finish(tmp_path, 0.5, 1)
    corpus = Corpus.load(tmp_path)
    assert corpus.array(0, "tokens").tolist() == [i for sentences in documents for s in sentences for i in s]
    assert corpus.array(0, "sentences").tolist() == list(range(700, 700 * 1200 + 1, 700))
    assert corpus.shards[0].tokens == 700 * 1200
