"""The recipes are programs, not a package: their folder goes on the path as it does when one is run."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"
sys.path.insert(0, str(RECIPE))

LENGTH = 32
TINY_MODEL = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}


@pytest.fixture(scope="session")
def recipe_folder():
    return RECIPE


@pytest.fixture(scope="session")
def recipe():
    from settings import DataSettings, Recipe, TokenizerSettings, TrainingSettings

    return Recipe(
        tokenizer=TokenizerSettings(vocabulary_size=500),
        data=DataSettings(sequence_length=LENGTH, held_out=0.1),
        model=TINY_MODEL,
        training=TrainingSettings(batch_size=8, steps=2, learning_rate=1e-2),
    )


@pytest.fixture(scope="session")
def documents():
    """Some topics of Python's documentation."""
    from corpus import read_documents

    return list(islice(read_documents("python-docs"), 80))


@pytest.fixture(scope="session")
def source(documents, tmp_path_factory):
    """A JSONL file of `documents`."""
    path = tmp_path_factory.mktemp("source") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(documents, recipe):
    from sentences import split_sentences
    from train_tokenizer import train_tokenizer

    return train_tokenizer((s for d in documents for s in split_sentences(d.text)), recipe.tokenizer, LENGTH)


@pytest.fixture(scope="session")
def data(source, tokenizer, recipe, tmp_path_factory):
    """`source` prepared for `recipe`."""
    from prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare([source], tokenizer, [recipe.data], folder, piece_bytes=50_000)
    return folder
