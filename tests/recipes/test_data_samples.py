"""What samples are made of, and what is hidden in them."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
import torch
from cutting import SPLITS, cut_document, cut_stream, rows_name, samples_folder, split_long
from data import held_out_loader, label_name, training_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import IGNORED, MaskingCollator
from prepare import cut_samples, finish
from samples import IS_NEXT, IS_RANDOM, SWAPPED, SampleReader, shortened
from settings import DataSettings
from shards import Corpus, ShardWriter, shard_path

LENGTH = 32


DOCUMENTS, SPECIAL = 60, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of documents of which every token is there once, in rising order: it tells where it comes from."""
    folder = tmp_path_factory.mktemp("numbered")
    rng = random.Random(0)
    token = SPECIAL
    for shard in range(3):
        with ShardWriter(shard_path(folder, shard), 1 << 16) as writer:
            for number in range(DOCUMENTS // 3):
                sentences = []
                for _ in range(rng.choice([1, 2, 3, 40])):
                    sentences.append(list(range(token, token + rng.choice([2, 5, 9, 14, 20, 50]))))
                    token = sentences[-1][-1] + 1
                writer.add(f"{shard} {number}", sentences)
    finish(folder, 0.2, 3)
    return folder


def reader_of(folder, kind="nsp", split="train", **options):
    settings = DataSettings(sequence_length=LENGTH, next=kind, held_out=0.2, **options)
    cut_samples(Corpus.load(folder), settings, workers=1)
    return SampleReader(folder, settings, split, seed=0)


def samples_of(folder, kind="nsp", split="train", epoch=0, **options):
    reader = reader_of(folder, kind, split, **options)
    return [reader.read(number, epoch) for number in range(len(reader))]


@pytest.fixture(scope="module")
def document_of(folder):
    """The document of each token."""
    corpus, document = Corpus.load(folder), []
    for shard in range(3):
        lengths = np.diff(corpus.array(shard, "documents")["token"].astype(int), prepend=0)
        document += np.repeat(np.arange(len(lengths)) + shard * DOCUMENTS // 3, lengths).tolist()
    return np.array([-1] * SPECIAL + document)


def test_next_sentence_labels_are_right(folder, document_of):
    labels = Counter()
    for sample in samples_of(folder):
        first, second = sample.segments
        assert len(first) > 0 and len(second) > 0 and len(first) + len(second) <= LENGTH - 3
        assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all()
        (one,), (other,) = set(document_of[first]), set(document_of[second])
        if sample.label == IS_NEXT:
            assert one == other and first[-1] < second[0]
        else:
            assert sample.label == IS_RANDOM and one != other
        labels[sample.label] += 1
    assert labels[IS_NEXT] / labels.total() == pytest.approx(0.45, abs=0.1)


def test_partners_come_from_all_shards_and_positions(folder, document_of):
    seconds = [s.segments[1] for epoch in range(4) for s in samples_of(folder, epoch=epoch) if s.label == IS_RANDOM]
    documents = Counter(document_of[second[0]] for second in seconds)
    assert {number * 3 // DOCUMENTS for number in documents} == {0, 1, 2}
    firsts = {number: int(np.flatnonzero(document_of == number)[0]) for number in documents}
    assert 0 < sum(second[0] == firsts[document_of[second[0]]] for second in seconds) < len(seconds) / 2


def test_order_labels_are_right(folder, document_of):
    labels = Counter()
    for sample in samples_of(folder, "sop"):
        first, second = sample.segments[::-1] if sample.label == SWAPPED else sample.segments
        assert len(first) > 0 and len(second) > 0 and len(first) + len(second) <= LENGTH - 3
        assert first[-1] < second[0] and document_of[first[0]] == document_of[second[-1]]
        labels[sample.label] += 1
    assert labels[SWAPPED] / labels.total() == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("length", [LENGTH, 128])
def test_samples_without_labels_are_full_and_have_all_text_once(folder, document_of, length):
    found = []
    for split in SPLITS:
        settings = DataSettings(sequence_length=length, next="none", held_out=0.2)
        cut_samples(Corpus.load(folder), settings, workers=1)
        reader = SampleReader(folder, settings, split, 0)
        sizes = []
        for sample in (reader.read(number, 0) for number in range(len(reader))):
            assert sample.label is None
            assert all(len(set(document_of[segment])) == 1 for segment in sample.segments)
            sizes.append(sum(len(segment) + 1 for segment in sample.segments) + 1)
            found += np.concatenate(sample.segments).tolist()
        # Where a document ends one token in front of the end, no other begins; shards end where they end.
        assert max(sizes) == length and sum(size < length - 1 for size in sizes) <= 3
    assert sorted(found) == list(range(SPECIAL, len(document_of)))


def test_pairs_have_all_text_but_what_is_shortened(folder, document_of):
    tokens = [t for split in SPLITS for s in samples_of(folder, "sop", split) for x in s.segments for t in x.tolist()]
    assert max(Counter(tokens).values()) == 1
    assert len(tokens) > 0.65 * len(document_of)
    starts = [t for split in SPLITS for s in samples_of(folder, "nsp", split) for t in s.segments[0].tolist()]
    assert max(Counter(starts).values()) == 1


def test_splits_share_no_document_and_are_the_same_for_all_kinds(folder, document_of):
    held_out = set()
    for kind in ("nsp", "sop", "none"):
        train, held = (
            {number for s in samples_of(folder, kind, split) for x in s.segments for number in document_of[x].tolist()}
            for split in SPLITS
        )
        assert not train & held
        assert len(train | held) == DOCUMENTS and 4 <= len(held) <= 24
        held_out.add(frozenset(held))
    assert len(held_out) == 1


def test_partners_and_order_change_from_epoch_to_epoch(folder):
    for kind in ("nsp", "sop"):
        first, second = samples_of(folder, kind), samples_of(folder, kind, epoch=1)
        same = [all(map(np.array_equal, a.segments, b.segments)) for a, b in zip(first, second)]
        assert 0 < sum(same) / len(same) < 0.7
        assert [a.segments[0].tolist() for a in first] == [a.segments[0].tolist() for a in samples_of(folder, kind)]


def test_passes_cut_at_other_places(folder):
    once, twice = reader_of(folder), reader_of(folder, passes=2)
    assert len(twice) == pytest.approx(2 * len(once), rel=0.1)
    for shard in range(3):
        first, both = (
            np.load(samples_folder(folder, reader.settings) / rows_name("train", shard)) for reader in (once, twice)
        )
        assert (both[: len(first)] == first).all()
        again = both[len(first) :]
        assert 0.2 < np.isin(again, first).mean() < 0.9
    assert len(reader_of(folder, split="held_out")) == len(reader_of(folder, split="held_out", passes=2))


document = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(deadline=None)
@given(document, st.integers(5, 50), st.sampled_from(["nsp", "sop"]), st.integers(0, 99))
def test_documents_are_cut_without_gaps(sentences, length, kind, seed):
    start = 7
    ends = (start + np.cumsum(sentences)).tolist()
    pieces = split_long(start, ends, length)
    assert set(ends) <= set(pieces) and max(np.diff([start, *pieces])) <= length
    at = start
    for begin, middle, end in cut_document(start, pieces, length, kind, random.Random(seed)):
        assert begin - at <= (kind == "sop"), "only a lone token cannot be divided"
        assert begin < middle <= end and (kind == "nsp" or middle < end)
        assert kind == "sop" or {middle, end} <= set(pieces)
        at = end
    assert ends[-1] - at <= (kind == "sop")


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(2, 30))
def test_a_stream_is_cut_without_gaps(lengths, room_):
    ends = np.cumsum(lengths).tolist()
    documents = list(zip([0, *ends], ends))
    rows = [row for rows in cut_stream(documents, room_) for row in rows]
    assert [start for start, _, _ in rows] == [0, *(end for _, _, end in rows)][: len(rows)]
    assert (rows[-1][2] if rows else 0) == sum(lengths)
    sizes = [end - start + sum(start < e < end for e in ends) for start, _, end in rows]
    assert all(room_ - 1 <= size <= room_ for size in sizes[:-1]) and all(size <= room_ for size in sizes)


def test_segments_are_shortened_at_either_end():
    rng = np.random.default_rng(0)
    for lengths, expected in [
        ((3, 4), (3, 4)),
        ((30, 4), (6, 4)),
        ((4, 30), (4, 6)),
        ((20, 30), (5, 5)),
        ((5, 9), (5, 5)),
    ]:
        segments = [np.arange(length) for length in lengths]
        result = shortened(segments, 10, rng)
        assert tuple(map(len, result)) == expected
        assert all((np.diff(segment) == 1).all() for segment in result)
    starts = {int(shortened([np.arange(30), np.arange(4)], 10, rng)[0][0]) for _ in range(50)}
    assert len(starts) > 5


def test_masks(data, tokenizer, recipe):
    reader = SampleReader(data, recipe.data, "train", 0)
    samples = [reader.read(number, 0) for number in range(2000)]
    collator = MaskingCollator(tokenizer, LENGTH, 0.15, 0)
    batch = collator(samples)
    original = torch.zeros_like(batch["input_ids"])
    for row, sample in enumerate(samples):
        ids, types = collator.with_special_tokens(sample)
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        assert types.sum() == len(sample.segments[1]) + 1 and (np.diff(types) >= 0).all()
        original[row, : len(ids)] = torch.from_numpy(ids)
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(original[chosen], special).any()
    assert chosen.any(1).all()
    ordinary = ~torch.isin(original, special)
    assert chosen.sum().item() / ordinary.sum().item() == pytest.approx(0.15, abs=0.01)
    inputs = batch["input_ids"][chosen]
    assert (inputs == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (inputs == original[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(batch["attention_mask"], (original != tokenizer.pad_token_id).long())
    assert batch["next_sentence_label"].tolist() == [sample.label for sample in samples]


def test_masks_depend_on_seed_epoch_and_sample_alone(data, tokenizer, recipe):
    reader = SampleReader(data, recipe.data, "train", 0)
    samples = [reader.read(number, 0) for number in range(16)]
    collator = MaskingCollator(tokenizer, LENGTH, 0.15, 0)
    whole, part = collator(samples), collator(samples[5:7])
    assert torch.equal(whole["input_ids"][5:7], part["input_ids"])
    assert torch.equal(whole["labels"][5:7], part["labels"])
    assert not torch.equal(MaskingCollator(tokenizer, LENGTH, 0.15, 1)(samples)["labels"], whole["labels"])
    later = [dataclasses.replace(sample, epoch=1) for sample in samples]
    assert not torch.equal(collator(later)["labels"], whole["labels"])


def test_whole_words_are_hidden_together(data, tokenizer, recipe):
    reader = SampleReader(data, recipe.data, "train", 0)
    samples = [reader.read(number, 0) for number in range(2000)]
    collator = MaskingCollator(tokenizer, LENGTH, 0.15, 0, whole_words=True)
    batch = collator(samples)
    inner = np.char.startswith(np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))), "##")
    hidden, ordinary = 0, 0
    for sample, labels in zip(samples, batch["labels"].numpy()):
        ids, _ = collator.with_special_tokens(sample)
        chosen = labels[: len(ids)] != IGNORED
        # A piece goes with the one before it, but for the first of a segment.
        follows = np.flatnonzero(inner[ids] & ~np.isin(np.roll(ids, 1), tokenizer.all_special_ids))
        assert (chosen[follows] == chosen[follows - 1]).all()
        hidden, ordinary = hidden + chosen.sum(), ordinary + len(ids) - 3
    assert inner[ids].any()
    assert hidden / ordinary == pytest.approx(0.15, abs=0.01)
    plain = MaskingCollator(tokenizer, LENGTH, 0.15, 0)(samples)
    assert not torch.equal(plain["labels"], batch["labels"])


def test_labels_have_the_name_that_the_model_gives_them(data, tokenizer, recipe):
    for model_type, kind, name in [("bert", "nsp", "next_sentence_label"), ("albert", "sop", "sentence_order_label")]:
        own = dataclasses.replace(recipe, data=with_kind(data, recipe, kind), model={"model_type": model_type})
        assert label_name(own) == name
        assert next(iter(training_loader(data, own, rank=0, ranks=1)))[name].shape == (8,)
    none = dataclasses.replace(recipe, data=with_kind(data, recipe, "none"))
    batch = next(iter(held_out_loader(data, none, rank=0, ranks=1)))
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert not batch["token_type_ids"].any()


def with_kind(data, recipe, kind):
    settings = dataclasses.replace(recipe.data, next=kind)
    cut_samples(Corpus.load(data), settings, workers=1)
    return settings
