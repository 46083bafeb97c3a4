"""Text of the BERT recipe: where it comes from, its sentences, and the tokenizer that is learnt from it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pytest
from corpus import Piece, find_pieces, read_documents
from datasets import Dataset
from encoding import load_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import split_sentences
from settings import TokenizerSettings
from train_tokenizer import build_tokenizer, count_sources, train_tokenizer
from transformers import AutoTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"
PRINT_DIGEST = """
import hashlib, itertools, sys, corpus
digest = hashlib.sha256()
for document in itertools.islice(corpus.read_documents("python-docs"), 150):
    digest.update(repr((document.name, document.text)).encode())
print(digest.hexdigest(), "turtle" in sys.modules)
"""


def test_python_docs_are_prose_in_a_fixed_order_and_import_no_module():
    documents = list(read_documents("python-docs"))
    words = Counter(word.lower() for d in documents for word in d.text.split())
    assert words.total() > 200_000
    assert words.most_common(1)[0][0] == "the"
    assert len(documents) > 300
    assert not any(">>>" in d.text for d in documents)
    paragraphs = Counter(p for d in documents for p in d.text.split("\n\n"))
    assert max(paragraphs.values()) == 1
    digest = hashlib.sha256()
    for document in documents[:150]:
        digest.update(repr((document.name, document.text)).encode())
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    answer = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST], cwd=RECIPE, env=environment, check=True, capture_output=True, text=True
    )
    assert answer.stdout.split() == [digest.hexdigest(), "False"]


def test_english_sentences():
    text = 'Give up, e.g. now.  It (really) ends here!\n\n"Is it?" He said so:\n    Then\n  came 3.5 more\n'
    assert split_sentences(text) == [
        "Give up, e.g. now.",
        "It (really) ends here!",
        '"Is it?"',
        "He said so:",
        "Then came 3.5 more",
    ]
    assert split_sentences(" \n\n ") == []
    sentences = ["Mr. Smith met J. Doe.", "So did I.", "He left."]
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("晴れです。雨でしょう！本当ですか？！はい", ["晴れです。", "雨でしょう！", "本当ですか？！", "はい"]),
        ("彼は「そうだ。行こう」と言った。それから出た。", ["彼は「そうだ。行こう」と言った。", "それから出た。"]),
        ("「ありがとう。」彼女は帰った。", ["「ありがとう。」", "彼女は帰った。"]),
        ("『本（上）。』を読む。", ["『本（上）。』を読む。"]),
        ("「壊れた。次の文。最後。", ["「壊れた。", "次の文。", "最後。"]),
        ("見出し\n一行目。\n二行目", ["見出し", "一行目。", "二行目"]),
        ("Python 3で書く。Use it. Then stop.", ["Python 3で書く。", "Use it.", "Then stop."]),
    ],
)
def test_japanese_sentences(text, sentences):
    assert split_sentences(text) == sentences


@settings(deadline=None)
@given(st.text(alphabet="あア亜。！？「」『』（）aA. \n", max_size=60))
def test_no_character_is_lost_between_sentences(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_local_files_give_their_documents(tmp_path):
    texts = ["One.\nTwo.", "Three.", ""]
    records = "".join(json.dumps({"body": t, "n": 1}) + "\n" for t in texts)
    lines = "\n\n \nOne.\nTwo.\n\n  \nThree.\n"
    (tmp_path / "a.jsonl").write_text(records)
    Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    with pyarrow.output_stream(str(tmp_path / "e.txt.zst"), compression="zstd") as file:
        file.write(lines.encode())
    names = ["a.jsonl", "b.parquet", "c.txt", "d.jsonl.gz", "e.txt.zst"]
    for name in names:
        found = [d.text.split() for d in read_documents(str(tmp_path / name), text_column="body")]
        assert found == [["One.", "Two."], ["Three."]], name
    for folder in (str(tmp_path), f"{tmp_path}/*.*"):
        files = [d.name.partition(":")[0] for d in read_documents(folder, text_column="body")]
        assert files == [f"{tmp_path}/{name}" for name in names for _ in range(2)]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["", " ", "a", "b c", "é"]), max_size=25),
    st.integers(1, 40),
    st.sampled_from(["txt", "jsonl"]),
)
def test_pieces_of_a_file_have_each_of_its_documents_once(tmp_path_factory, lines, piece_bytes, suffix):
    path = tmp_path_factory.getbasetemp() / f"pieces.{suffix}"
    if suffix == "jsonl":
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(lines), encoding="utf-8")
    whole = [
        d.text
        for d in Piece(kind={"txt": "text", "jsonl": "records"}[suffix], name=str(path), text_column="text").documents()
    ]
    pieces = find_pieces([str(path)], piece_bytes=piece_bytes)
    assert [d.text for piece in pieces for d in piece.documents()] == whole
    assert sum(piece.size for piece in pieces) == path.stat().st_size


def test_parquet_is_divided_at_row_groups(tmp_path):
    texts = [f"Text {i}." for i in range(10)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet", batch_size=3)
    pieces = find_pieces([str(tmp_path / "a.parquet")], piece_bytes=1)
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [d.text for piece in pieces for d in piece.documents()] == texts


def test_a_data_set_of_the_hub_is_read_shard_by_shard(tmp_path, monkeypatch):
    (tmp_path / "wiki").mkdir()
    for number in range(3):
        records = [json.dumps({"text": f"Text {number} {i}."}) + "\n" for i in range(2)]
        (tmp_path / "wiki" / f"train-{number}.jsonl").write_text("".join(records))
    original, asked = datasets.load_dataset, []

    def load_dataset(*name, **options):
        # It takes a folder for a data set as it takes a name on the hub.
        asked.append(name)
        return original(str(tmp_path / "wiki"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pieces = find_pieces(["some/wiki:en"])
    assert [(piece.kind, piece.start, piece.end) for piece in pieces] == [("hub", n, 3) for n in range(3)]
    texts = [d.text for piece in pieces for d in piece.documents()]
    assert texts == [f"Text {n} {i}." for n in range(3) for i in range(2)]
    assert set(asked) == {("some/wiki", "en")}


def test_wrong_sources_say_what_is_wrong(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:0: no text under 'text'; its fields are body"):
        list(read_documents(str(tmp_path / "a.jsonl")))
    with pytest.raises(ValueError, match="no such file"):
        list(read_documents(str(tmp_path / "none.txt")))
    (tmp_path / "empty").mkdir()
    for source in ("empty", "*.txt"):
        with pytest.raises(ValueError, match=r"expected \.txt, \.jsonl, \.parquet"):
            list(read_documents(str(tmp_path / source)))


def test_tokenizer_round_trip(documents, tokenizer, recipe, tmp_path):
    sentence = "return the value of the object, or raise an error."
    assert tokenizer.decode(tokenizer(sentence, add_special_tokens=False)["input_ids"]) == sentence
    assert len(tokenizer) == 500
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    sentences = [s for d in documents for s in split_sentences(d.text)]
    assert train_tokenizer(sentences[::-1], recipe.tokenizer, 32).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pair = loaded("Return it", "or [MASK] it")
    assert pair == tokenizer("Return it", "or [MASK] it")
    assert loaded.mask_token_id in pair["input_ids"]
    assert pair["token_type_ids"] == sorted(pair["token_type_ids"]) and set(pair["token_type_ids"]) == {0, 1}
    encode, size = load_encoder(tmp_path)
    assert size == 500
    assert encode(sentences[:50]) == loaded(sentences[:50], add_special_tokens=False)["input_ids"]
    # In the text that is only text.
    assert loaded.sep_token_id not in encode(["an [SEP] in the text"])[0]


def test_a_vocabulary_covers_the_frequent_characters(tmp_path):
    settings = TokenizerSettings(vocabulary_size=100, alphabet=3)
    vocabulary = train_tokenizer(["abc abc ab", "abz"] * 2, settings, 32).get_vocab()
    assert {"a", "##b", "##c", "abc"} <= set(vocabulary)
    assert not any("z" in token for token in vocabulary)


def test_vocabulary_of_several_pieces_and_of_their_beginnings(source, tokenizer, recipe):
    pieces = find_pieces([source], piece_bytes=50_000)
    assert len(pieces) > 2
    words = count_sources(pieces, recipe.tokenizer, workers=1)
    assert build_tokenizer(words, recipe.tokenizer, 32).get_vocab() == tokenizer.get_vocab()
    # Each of many gives its beginning, to the end of a document.
    sample = count_sources(pieces * 8, TokenizerSettings(vocabulary_size=500, sample_megabytes=1), workers=1)
    assert 0.2 < sample.total() / (8 * words.total()) < 0.6
