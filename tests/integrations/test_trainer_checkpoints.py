"""What RanncTrainer writes into its checkpoints, and what it reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import rannc_hf
from rannc_hf import RanncTrainer
from rannc_hf.checkpoint import read_manifest
from rannc_hf.checkpoint.export_hf import export
from tests.integrations.trainers import SIZES, Regression, classifier, make, points, same_weights, sentences, weights

pytestmark = pytest.mark.usefixtures("environment")
OPTIONS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}


def trained(folder: Path, model: Any, data: Any, resume: str | None = None, **options: Any) -> RanncTrainer:
    trainer: RanncTrainer = make(RanncTrainer, folder, model, data, **OPTIONS, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_weights_are_stored_once_and_read_by_all(tmp_path: Path):
    wanted, checkpoint = weights(trained(tmp_path, classifier(), sentences(16))), tmp_path / "checkpoint-4"
    assert not (checkpoint / "rannc" / "model").exists()
    same_weights(dict(AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()), wanted)
    with pytest.raises(ValueError, match=r"whose weights lie beside it: .*checkpoint-4"):
        export(checkpoint / "rannc", tmp_path / "exported")
    torch.manual_seed(8)
    with rannc_hf.deferred_init():
        deferred = BertForSequenceClassification(BertConfig(num_labels=3, **SIZES))
    for model in (other(), deferred):
        same_weights(weights(trained(tmp_path, model, sentences(16), str(tmp_path / "checkpoint-2"))), wanted)


def other() -> BertForSequenceClassification:
    torch.manual_seed(9)
    return BertForSequenceClassification(BertConfig(num_labels=3, **SIZES))


def test_damaged_weights_are_named(tmp_path: Path):
    trained(tmp_path, Regression(), points(16))
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    content = file.read_bytes()
    for left, reason in [
        (None, r"\.\./model\.safetensors is missing"),
        (content[:-4], rf"\.\./model\.safetensors has {len(content) - 4} bytes instead of {len(content)}"),
        (content[:-4] + b"abcd", r"\.\./model\.safetensors has changed since it was written"),
    ]:
        file.unlink()
        if left is not None:
            file.write_bytes(left)
        with pytest.raises(ValueError, match=reason):
            trained(tmp_path, Regression(), points(16), str(tmp_path / "checkpoint-2"))
        file.write_bytes(content)


class Forgetful(BertForSequenceClassification):
    """Its files lack a weight: training could not go on from them alone."""

    _keys_to_ignore_on_save: ClassVar = ["classifier.bias"]


def forgetful() -> BertForSequenceClassification:
    torch.manual_seed(3)
    model = Forgetful(BertConfig(num_labels=3, **SIZES))
    torch.nn.init.ones_(model.classifier.bias)
    return model


def test_what_files_of_transformers_lack_is_kept_by_the_processes(tmp_path: Path):
    trainer = trained(tmp_path, forgetful(), sentences(16))
    checkpoint = tmp_path / "checkpoint-4"
    assert "classifier.bias" not in load_file(checkpoint / "model.safetensors")
    wanted = weights(trainer)
    assert wanted["classifier.bias"].sum() > 2 and (checkpoint / "rannc" / "model").is_dir()
    model = forgetful()
    torch.nn.init.zeros_(model.classifier.bias)
    again = trained(tmp_path, model, sentences(16), str(tmp_path / "checkpoint-2"))
    same_weights(weights(again), wanted)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    again.state.best_model_checkpoint = str(checkpoint)
    again._load_best_model()
    same_weights(weights(again), wanted)


def test_shards_are_listed_with_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = classifier()
    monkeypatch.setattr("rannc_hf.checkpoint.parts.ONE_FILE", 0)
    original = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda *a, **k: original(*a, **{**k, "max_shard_size": "10KB"}))
    trained(tmp_path, model, sentences(16))
    checkpoint = tmp_path / "checkpoint-2"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    listed = {name for name in read_manifest(checkpoint / "rannc")["files"] if name.startswith("../")}
    assert listed == {f"../{name}" for name in {*index["weight_map"].values(), "model.safetensors.index.json"}}
