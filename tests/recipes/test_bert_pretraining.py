"""The BERT recipe: its text, its samples, its masks, and two steps of training in one plain process."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from corpus import Document, read_documents, split_sentences
from data import IGNORED, MaskingCollator
from datasets import Dataset, load_from_disk
from evaluation import evaluate, sample_sums
from fill_mask import fill_mask
from prepare import IS_NEXT, IS_RANDOM, prepare
from pretrain import build_model, build_optimizer
from settings import DataSettings, Recipe, TokenizerSettings, TrainingSettings
from torch.utils.data import DataLoader
from train_tokenizer import train_tokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"
LENGTH = 32
TINY_MODEL = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}
PRINT_DIGEST = """
import hashlib, sys, corpus
digest = hashlib.sha256()
for document in corpus.read_documents("python-docs"):
    digest.update(repr((document.name, document.text)).encode())
print(digest.hexdigest(), "turtle" in sys.modules)
"""


@pytest.fixture(scope="module")
def documents():
    return list(read_documents("python-docs"))


@pytest.fixture(scope="module")
def few(documents):
    """About a tenth of the documents, topics and modules alike."""
    return documents[::10]


@pytest.fixture(scope="module")
def tokenizer(few):
    return train_tokenizer((s for d in few for s in split_sentences(d.text)), 500, LENGTH)


@pytest.fixture(scope="module")
def recipe():
    return Recipe(
        tokenizer=TokenizerSettings(vocabulary_size=500),
        data=DataSettings(sequence_length=LENGTH, held_out=0.1),
        model=TINY_MODEL,
        training=TrainingSettings(batch_size=8, steps=2, learning_rate=1e-2),
    )


@pytest.fixture(scope="module")
def splits(few, tokenizer, recipe):
    return prepare(few, tokenizer, recipe.data, seed=1)


def make_collator(tokenizer, seed=0):
    return MaskingCollator(tokenizer, LENGTH, 0.15, seed)


def test_python_docs_are_real_prose(documents):
    words = Counter(word.lower() for d in documents for word in d.text.split())
    assert words.total() > 200_000
    assert words.most_common(1)[0][0] == "the"
    assert len(documents) > 300
    assert not any(">>>" in d.text for d in documents)


def test_python_docs_repeat_no_paragraph(documents):
    paragraphs = Counter(p for d in documents for p in d.text.split("\n\n"))
    assert max(paragraphs.values()) == 1


def test_python_docs_are_the_same_in_another_process_and_import_no_module(documents):
    digest = hashlib.sha256()
    for document in documents:
        digest.update(repr((document.name, document.text)).encode())
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    answer = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST], cwd=RECIPE, env=environment, check=True, capture_output=True, text=True
    )
    assert answer.stdout.split() == [digest.hexdigest(), "False"]


def test_sentences():
    text = 'Give up, e.g. now.  It (really) ends here!\n\n"Is it?" He said so:\n    Then\n  came 3.5 more\n'
    assert split_sentences(text) == [
        "Give up, e.g. now.",
        "It (really) ends here!",
        '"Is it?"',
        "He said so:",
        "Then came 3.5 more",
    ]
    assert split_sentences(" \n\n ") == []


def test_local_files_give_their_documents_once(tmp_path):
    texts = ["One.\nTwo.", "Three.", "One.\nTwo.", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t, "n": 1}) + "\n" for t in texts))
    Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("One.\nTwo.\n\nThree.\n\nOne.\nTwo.\n")
    for name in ("a.jsonl", "b.parquet", "c.txt"):
        found = [split_sentences(d.text) for d in read_documents(str(tmp_path / name), "body")]
        assert found == [["One.", "Two."], ["Three."]], name
    # The folder as a whole: the line ends of the text file make it another text, the parquet file adds nothing.
    assert [d.name for d in read_documents(str(tmp_path), "body")] == [
        f"{tmp_path}/a.jsonl:0",
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/c.txt:0",
    ]


def test_wrong_sources_say_what_is_wrong(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:0: no text under 'text'; its fields are body"):
        list(read_documents(str(tmp_path / "a.jsonl")))
    with pytest.raises(ValueError, match="no such file"):
        list(read_documents(str(tmp_path / "none.txt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected \.txt, \.jsonl, \.parquet"):
        list(read_documents(str(tmp_path / "empty")))


def test_tokenizer_round_trip(few, tokenizer, tmp_path):
    sentence = "return the value of the object, or raise an error."
    assert tokenizer.decode(tokenizer(sentence, add_special_tokens=False)["input_ids"]) == sentence
    assert len(tokenizer) == 500
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    again = train_tokenizer((s for d in few for s in split_sentences(d.text)), 500, LENGTH)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pair = loaded("Return it", "or [MASK] it")
    assert pair == tokenizer("Return it", "or [MASK] it")
    assert loaded.mask_token_id in pair["input_ids"]
    assert pair["token_type_ids"] == sorted(pair["token_type_ids"]) and set(pair["token_type_ids"]) == {0, 1}


def test_splits_share_no_document_and_no_pair(splits):
    names = {
        split: set(splits[split]["document"]) | set(splits[split]["second_document"]) for split in ("train", "held_out")
    }
    assert names["train"] and names["held_out"]
    assert names["train"].isdisjoint(names["held_out"])
    train = {tuple(ids) for ids in splits["train"]["input_ids"]}
    # Two pairs of two words can be equal by chance; pairs of real length cannot.
    assert not any(tuple(ids) in train for ids in splits["held_out"]["input_ids"] if len(ids) > 12)
    assert splits["train"]["sample_id"][:] == list(range(len(splits["train"])))


def test_next_sentence_labels_are_right(few, tokenizer, splits):
    streams = {}
    for document in few:
        ids = tokenizer(split_sentences(document.text), add_special_tokens=False)["input_ids"]
        streams[document.name] = " ".join(str(i) for sentence in ids for i in sentence)
    labels = Counter()
    for sample in splits["train"]:
        ids, types = np.array(sample["input_ids"]), np.array(sample["token_type_ids"])
        assert len(ids) <= LENGTH and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        first, second = ids[types == 0][1:-1], ids[types == 1][:-1]
        assert len(first) and len(second)
        label = sample["next_sentence_label"]
        assert (label == IS_NEXT) == (sample["document"] == sample["second_document"])
        assert " ".join(map(str, first)) in streams[sample["document"]]
        assert " ".join(map(str, second)) in streams[sample["second_document"]]
        labels[label] += 1
    assert labels[IS_NEXT] / labels.total() == pytest.approx(0.45, abs=0.1)
    assert labels[IS_RANDOM] + labels[IS_NEXT] == labels.total()


def test_a_following_piece_starts_where_the_first_ends(tokenizer, recipe):
    words = tokenizer.convert_tokens_to_ids(["return", "the", "value", "of"])
    texts = [" ".join(["return the value of"] * 3) + "." for _ in range(4)]
    short = [Document(str(i), text + "\n\nthe value.") for i, text in enumerate(texts)]
    samples = prepare(short, tokenizer, DataSettings(sequence_length=LENGTH, passes=20), seed=0)["train"]
    following = [s for s in samples if s["next_sentence_label"] == IS_NEXT]
    assert following
    for sample in following:
        ids = [i for i in sample["input_ids"] if i not in tokenizer.all_special_ids]
        assert ids[:4] == words and ids[-3:] == tokenizer("the value.", add_special_tokens=False)["input_ids"]


def test_preparation_repeats_itself_and_refuses_too_little(few, tokenizer, recipe, splits):
    again = prepare(few, tokenizer, recipe.data, seed=1)
    assert again["train"].to_dict() == splits["train"].to_dict()
    assert prepare(few, tokenizer, recipe.data, seed=2)["train"].to_dict() != splits["train"].to_dict()
    with pytest.raises(ValueError, match="has 3 documents"):
        prepare(few[:3], tokenizer, recipe.data, seed=1)


def test_masks(tokenizer, splits):
    samples = list(splits["train"])
    batch = make_collator(tokenizer)(samples)
    original = torch.zeros_like(batch["input_ids"])
    for row, sample in enumerate(samples):
        original[row, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert not torch.isin(original[chosen], torch.tensor(tokenizer.all_special_ids)).any()
    assert chosen.any(1).all()
    ordinary = ~torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert chosen.sum().item() / ordinary.sum().item() == pytest.approx(0.15, abs=0.01)
    inputs = batch["input_ids"][chosen]
    masked = (inputs == tokenizer.mask_token_id).float().mean().item()
    kept = (inputs == original[chosen]).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([len(s["input_ids"]) for s in samples]))
    assert batch["next_sentence_label"].tolist() == [s["next_sentence_label"] for s in samples]


def test_masks_depend_on_seed_epoch_and_sample_alone(tokenizer, splits):
    samples = [splits["train"][i] for i in range(16)]
    collator = make_collator(tokenizer)
    whole, part = collator(samples), collator(samples[5:7])
    assert torch.equal(whole["input_ids"][5:7], part["input_ids"])
    assert torch.equal(whole["labels"][5:7], part["labels"])
    assert not torch.equal(make_collator(tokenizer, seed=1)(samples)["labels"], whole["labels"])
    collator.epoch = 1
    assert not torch.equal(collator(samples)["labels"], whole["labels"])
    collator.sequence_length = 8
    with pytest.raises(ValueError, match="prepare the data again"):
        collator(samples)


def test_evaluation_is_exact_whatever_the_batch_size(tokenizer, splits, recipe):
    model = build_model(recipe, tokenizer).eval()
    split = splits["held_out"].select(range(11))
    whole = make_collator(tokenizer)(list(split))
    with torch.no_grad():
        outputs = model(**whole)
    sums = sample_sums(outputs.prediction_logits, outputs.seq_relationship_logits, whole)
    assert sums[:, 1].tolist() == (whole["labels"] != IGNORED).sum(1).tolist()
    accelerator = Accelerator(cpu=True)
    for size in (4, 11):
        loader = accelerator.prepare(DataLoader(split, size, collate_fn=make_collator(tokenizer)))
        figures = evaluate(accelerator, model, loader)
        assert figures.loss == pytest.approx(outputs.loss.item(), rel=1e-5)
    right = outputs.seq_relationship_logits.argmax(-1) == whole["next_sentence_label"]
    assert figures.next_sentence_accuracy == pytest.approx(right.double().mean().item())
    accelerator.state._reset_state(reset_partial_state=True)


def test_weight_decay_spares_vectors(tokenizer, recipe):
    model = build_model(recipe, tokenizer)
    decay, no_decay = build_optimizer(model, recipe.training).param_groups
    assert decay["weight_decay"] == 0.01 and no_decay["weight_decay"] == 0
    spared = {id(p) for p in no_decay["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in spared) == (name.endswith("bias") or "LayerNorm" in name), name
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "epochs", 3, "training: unknown key epochs; known are batch_size"),
        ("data", "held_out", 1.5, "data: held_out=1.5 must be between 0 and 1"),
        ("training", "warmup_steps", 9999, "training: warmup_steps=9999 must be below steps"),
    ],
)
def test_wrong_settings_name_the_key(tmp_path, section, key, value, message):
    content = json.loads((RECIPE / "configs" / "demo.json").read_text())
    content[section][key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "config.json")


def test_two_steps_in_one_process_give_a_checkpoint(tmp_path, tokenizer, splits):
    splits.save_to_disk(tmp_path / "data")
    tokenizer.save_pretrained(tmp_path / "data" / "tokenizer")
    config = {
        "tokenizer": {"vocabulary_size": 500},
        "data": {"sequence_length": LENGTH},
        "model": TINY_MODEL,
        "training": {"batch_size": 8, "steps": 2, "learning_rate": 0.01, "log_every": 1, "evaluate_every": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(RECIPE / "pretrain.py"), "--config", str(tmp_path / "config.json")]
    command += ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "model")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert [r["step"] for r in records if "held_out_loss" in r] == [0, 1, 2]
    assert losses[0] == pytest.approx(math.log(500) + math.log(2), abs=0.2)
    assert losses[-1] < losses[0]
    assert all(r["samples_per_s"] > 0 for r in records if "loss" in r)

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    answers = fill_mask(model, AutoTokenizer.from_pretrained(tmp_path / "model"), "return the [MASK] of it.")
    assert len(answers) == 5
    assert [p for _, p in answers] == sorted((p for _, p in answers), reverse=True)
    with pytest.raises(ValueError, match="expected one"):
        fill_mask(model, AutoTokenizer.from_pretrained(tmp_path / "model"), "no mask")
    assert len(load_from_disk(str(tmp_path / "data"))["held_out"]) == len(splits["held_out"])
