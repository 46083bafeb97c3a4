"""`predict_with_generate`: RanncSeq2SeqTrainer in one process against Seq2SeqTrainer."""

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from rannc_hf import RanncModel, RanncSeq2SeqTrainer, RanncSeq2SeqTrainingArguments
from tests.integrations.trainers import history, same

pytestmark = pytest.mark.usefixtures("environment")
LENGTH = 7


def summariser():
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            # Tied, or with the usual small values, it would repeat one token.
            decoder_start_token_id=0, tie_word_embeddings=False, initializer_factor=3.0,
        )
    )  # fmt: skip
    model.generation_config.max_length = LENGTH
    return model


def texts(count, seed=1, labelled=True):
    tokens = torch.randint(2, 40, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": t, **({"labels": t[:4].clone()} if labelled else {})} for t in tokens]


def generated(prediction):
    return {"mean": float(prediction.predictions.mean()), "length": float(prediction.predictions.shape[1])}


def trainer_of(kind, folder, precision):
    ours = kind is RanncSeq2SeqTrainer
    arguments = RanncSeq2SeqTrainingArguments if ours else Seq2SeqTrainingArguments
    args = arguments(
        output_dir=str(folder), max_steps=2, learning_rate=1e-2, adam_epsilon=1e-6, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=4, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True,
        predict_with_generate=True, generation_max_length=LENGTH, eval_strategy="steps", eval_steps=1, **precision,
    )  # fmt: skip
    return kind(
        model=summariser(), args=args, train_dataset=texts(8), eval_dataset=texts(5, 2), compute_metrics=generated
    )


@pytest.fixture
def gathered(monkeypatch):
    """How often a model was made whole."""
    calls = []
    original = RanncModel.whole
    monkeypatch.setattr(RanncModel, "whole", lambda model: calls.append(model) or original(model))
    return calls


@pytest.mark.parametrize("labelled", [True, False])
def test_evaluation_and_prediction_generate(tmp_path, gathered, labelled):
    results = []
    for kind in (Seq2SeqTrainer, RanncSeq2SeqTrainer):
        trainer = trainer_of(kind, tmp_path, {})
        # Before the first batch of training, too.
        first = trainer.predict(texts(3, 4, labelled)).predictions
        trainer.train()
        results.append((first, trainer.predict(texts(5, 3, labelled), num_beams=2).predictions, history(trainer)))
    (begun, expected, logs), (ours_begun, actual, ours_logs) = results
    np.testing.assert_array_equal(ours_begun, begun)
    np.testing.assert_array_equal(actual, expected)
    same(ours_logs, logs)
    assert "eval_mean" in logs[1] and len(np.unique(expected)) > 3
    # Once for each of: the first prediction, two evaluations, the last prediction.
    assert len(gathered) == 4


def test_in_low_precision(tmp_path, gathered):
    trainer = trainer_of(RanncSeq2SeqTrainer, tmp_path, {"bf16": True, "use_cpu": True})
    trainer.train()
    assert len(gathered) == 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
