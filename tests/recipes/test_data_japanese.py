"""Japanese from text to batches: words by fugashi, WordPiece, and what users load afterwards."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import prepare
import pytest
import train_tokenizer
from data import training_loader
from encoding import load_encoder
from masking import IGNORED
from samples import SampleReader
from sentences import split_sentences
from settings import Recipe
from shards import Corpus
from transformers import AutoTokenizer, BertJapaneseTokenizer

# Short texts of a paragraph each, written for this test.
TEXTS = """
昨日は朝から雨が降っていた。傘を持って出かけたが、駅に着くころには靴がすっかり濡れてしまった。帰りには雨がやみ、空に虹が見えた。
祖母の家には大きな柿の木がある。秋になると、家族みんなで実を集める。甘い実は食べ、渋い実は皮をむいて軒先に干す。
新しい図書館が駅の近くにできた。建物は三階まであり、一階には子供の本が並んでいる。私は毎週土曜日に本を借りに行く。
弟は飛行機が好きだ。休みの日には空港へ行き、一日中飛行機を見ている。「いつか自分で飛ばしたい。」と言っている。
父は台所に立つことが多い。得意な料理は味噌汁と焼き魚である。昨日は豆腐と葱の味噌汁を作ってくれた。
この川には昔、木の橋がかかっていた。大雨で流されたあと、石の橋になった。今では多くの車が通る。
姉は大学で化学を学んでいる。水の中の小さな物質を調べる研究だ。実験は夜まで続くことがある。
冬の朝は空気が冷たい。息が白くなり、池には薄い氷が張る。子供たちは氷を割って遊ぶ。
犬の散歩は私の仕事だ。毎朝六時に起きて、公園を一周する。犬は走るのが速く、私はいつも後から追いかける。
駅前の店では温かい麺を売っている。昼には長い列ができる。私は列に並ぶのが嫌いなので、少し遅い時間に行く。
先生は黒板に大きな字で答えを書いた。「どうしてこうなるのか、考えてみよう。」と先生は言った。教室は静かになった。
海の近くの町で育った。夏には毎日泳ぎ、夕方には貝を拾った。今でも波の音を聞くと、その町を思い出す。
電車が遅れていた。駅員は「信号の故障です。」と説明した。私たちは三十分ほど待った。
母は庭で野菜を育てている。今年は胡瓜と茄子がよくできた。朝に取った野菜はとてもおいしい。
古い時計が壊れてしまった。町の時計屋に持って行くと、小さな部品を取り替えてくれた。今はまた正しい時を刻んでいる。
友達と山に登った。頂上からは遠くの海が見えた。おにぎりを食べて、少し休んでから下りた。
隣の家の猫がまた庭に来た。日の当たる場所で眠っている。名前を呼ぶと、片方の目だけを開ける。
夜の空には星がたくさん見える。北の空には動かない星がある。昔の人はその星を見て道を知った。
妹は絵を描くのが上手だ。花の絵も、人の絵も描く。先月、妹の絵が町の展覧会で選ばれた！
この本は三回読んだ。読むたびに新しいことに気がつく。あなたも読んでみませんか？
"""
CONFIG = {
    "tokenizer": {"vocabulary_size": 480, "lowercase": False, "words": "mecab"},
    "data": {"sequence_length": 32, "held_out": 0.25, "next": "sop", "whole_words": True},
    "model": {"model_type": "albert", "max_position_embeddings": 64},
    "training": {
        "learning_rate": 0.01,
        "phases": [{"batch_size": 4, "steps": 2}, {"sequence_length": 64, "batch_size": 2, "steps": 1}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two programs make of the texts."""
    folder = tmp_path_factory.mktemp("japanese")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS.split()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    common = ["--config", f"{folder}/config.json", "--source", f"{folder}/texts.jsonl", "--workers", "1"]
    run(train_tokenizer, *common, "--output", f"{folder}/tokenizer")
    run(prepare, *common, "--tokenizer", f"{folder}/tokenizer", "--output", f"{folder}/data")
    return folder


def run(program, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *arguments])
        program.main()


def test_the_tokenizer_is_what_users_of_japanese_models_load(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert isinstance(tokenizer, BertJapaneseTokenizer)
    assert len(tokenizer) <= 480 and tokenizer.model_max_length == 64
    words = ["昨日", "は", "朝", "から", "雨", "が", "降っ", "て", "い", "た", "。"]
    pieces = tokenizer.tokenize("昨日は朝から雨が降っていた。")
    assert " ".join(pieces).replace(" ##", "") == " ".join(words)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    pair = tokenizer("駅は近い。", "[MASK]は遠い。")
    assert set(pair["token_type_ids"]) == {0, 1} and tokenizer.mask_token_id in pair["input_ids"]
    assert tokenizer.decode(tokenizer("雨が降った")["input_ids"], skip_special_tokens=True) == "雨 が 降っ た"


def test_sentences_are_encoded_as_that_tokenizer_does(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encode, size = load_encoder(folder / "tokenizer")
    sentences = [sentence for text in TEXTS.split() for sentence in split_sentences(text)]
    assert size == len(tokenizer) and len(sentences) == 60
    assert encode(sentences) == tokenizer(sentences, add_special_tokens=False)["input_ids"]
    assert encode(["未知の漢字鬱"]) == tokenizer(["未知の漢字鬱"], add_special_tokens=False)["input_ids"]


def test_prepared_text_reads_as_the_source(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    corpus = Corpus.load(folder / "data")
    assert corpus.shards[0].documents == len(TEXTS.split())
    tokens, ends = corpus.array(0, "tokens"), corpus.array(0, "documents")["token"]
    for text, ids in zip(TEXTS.split(), np.split(tokens, ends[:-1])):
        read = tokenizer.decode(ids).replace(" ", "")
        unknown = read.count(tokenizer.unk_token)
        assert unknown < 4
        assert unknown or read == unicodedata.normalize("NFKC", text)


def test_batches_of_both_phases(folder):
    recipe = Recipe.load(folder / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    inner = np.char.startswith(np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))), "##")
    for phase, length in zip(recipe.phases(), (32, 64)):
        batch = next(iter(training_loader(folder / "data", phase, rank=0, ranks=1)))
        assert batch["input_ids"].shape == (phase.training.batch_size, length)
        assert set(batch["sentence_order_label"].tolist()) <= {0, 1}
        original = np.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
        chosen = batch["labels"].numpy() != IGNORED
        assert chosen.any(1).all()
        follows = inner[original] & (np.roll(original, 1, axis=1) > 4)
        assert (chosen[follows] == np.roll(chosen, 1, axis=1)[follows]).all()
    assert len(SampleReader(folder / "data", recipe.data, "held_out", 0)) > 2


def test_without_fugashi_the_error_names_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)
    recipe = Recipe.load(Path(__file__).parents[2] / "recipes" / "bert_pretraining" / "configs" / "demo.json")
    settings = dataclasses.replace(recipe.tokenizer, words="mecab")
    with pytest.raises(ModuleNotFoundError, match="fugashi"):
        train_tokenizer.count_words(["雨"], settings)
