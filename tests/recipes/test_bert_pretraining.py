"""The BERT recipe: its settings, its evaluation, and two steps of training in one plain process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from data import held_out_loader
from evaluation import evaluate, sample_sums
from fill_mask import fill_mask
from masking import IGNORED
from optimizers import build_optimizer
from pretrain import build_model
from settings import Recipe
from transformers import AutoModelForMaskedLM, AutoTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"


def of_batch_size(recipe, size):
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=size))


def test_evaluation_is_exact_whatever_the_batch_size(tokenizer, data, recipe):
    model = build_model(recipe, tokenizer).eval()
    (whole,) = held_out_loader(data, of_batch_size(recipe, 1000), rank=0, ranks=1)
    with torch.no_grad():
        outputs = model(**whole)
    sums = sample_sums(outputs, whole)
    assert sums[:, 1].tolist() == (whole["labels"] != IGNORED).sum(1).tolist()
    accelerator = Accelerator(cpu=True)
    for size in (7, 1000):
        figures = evaluate(accelerator, model, held_out_loader(data, of_batch_size(recipe, size), rank=0, ranks=1))
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


def test_two_steps_in_one_process_give_a_checkpoint(tmp_path, data, recipe):
    config = {
        "tokenizer": {"vocabulary_size": 500},
        "data": {"sequence_length": recipe.data.sequence_length, "held_out": recipe.data.held_out},
        "model": recipe.model,
        "training": {"batch_size": 8, "steps": 2, "learning_rate": 0.01, "log_every": 1, "evaluate_every": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(RECIPE / "pretrain.py"), "--config", str(tmp_path / "config.json")]
    command += ["--data", str(data), "--output", str(tmp_path / "model")]
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
