"""A small config with two phases, and data for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import prepare
import pytest
import train_tokenizer

CONFIG = {
    "tokenizer": {"vocabulary_size": 120},
    "data": {"sequence_length": 16, "held_out": 0.2},
    "model": {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.1,
    },
    "training": {
        "learning_rate": 0.01,
        "optimizer": "lamb",
        "log_every": 2,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "phases": [
            {"sequence_length": 16, "batch_size": 8, "steps": 5, "warmup_steps": 2},
            {"sequence_length": 24, "batch_size": 4, "steps": 4, "warmup_steps": 0, "decay": "cosine"},
        ],
    },
}


def make_folder(folder: Path) -> None:
    """Writes config.json, and the samples of both phases under data/."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    nouns, verbs = ["cat", "dog", "bird", "fish", "tree"], ["sees", "finds", "likes", "hears"]
    texts = [
        "\n".join(f"The {nouns[(i + j) % 5]} {verbs[i * j % 4]} a {nouns[(i * j + 1) % 5]}." for j in range(8))
        for i in range(12)
    ]
    (folder / "corpus.txt").write_text("\n\n".join(f"Text {i}.\n{text}" for i, text in enumerate(texts)))
    common = ["--config", str(folder / "config.json"), "--source", str(folder / "corpus.txt")]
    run(train_tokenizer, *common, "--output", str(folder / "tokenizer"))
    run(prepare, *common, "--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "data"))


def run(program: ModuleType, *arguments: str) -> None:
    """As from the command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *arguments])
        program.main()
