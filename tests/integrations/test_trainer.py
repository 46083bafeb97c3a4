"""RanncTrainer in one process: what scripts do with it, against Transformers' own Trainer."""

import json
import pickle

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rannc_hf import RanncModel, RanncTrainer, RanncTrainingArguments

pytestmark = pytest.mark.usefixtures("environment")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def classifier():
    torch.manual_seed(3)
    return BertForSequenceClassification(BertConfig(num_labels=3, **SIZES))


def language_model():
    torch.manual_seed(3)
    return BertForMaskedLM(BertConfig(**SIZES))


def sentences(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (count, 8), generator=generator)
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[0] % 3} for t in tokens]


def masked(count, seed=1):
    """Each sample has another number of labels."""
    samples = sentences(count, seed)
    for index, sample in enumerate(samples):
        labels = torch.full_like(sample["input_ids"], -100)
        labels[: 1 + index % 5] = sample["input_ids"][: 1 + index % 5]
        sample["labels"] = labels
    return samples


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def make(kind, folder, model, data, rannc=None, **options):
    arguments = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        adam_epsilon=1e-6,
        save_strategy="no",
    )
    extra = {k: options.pop(k) for k in list(options) if k in ("compute_metrics", "callbacks", "optimizers", "model_init")}
    extra.setdefault("eval_dataset", options.pop("eval_dataset", None))
    arguments |= options
    AcceleratorState._reset_state(reset_partial_state=True)
    args = RanncTrainingArguments(rannc=rannc, **arguments) if kind is RanncTrainer else TrainingArguments(**arguments)
    return kind(model=model, args=args, train_dataset=data, **extra)


def history(trainer):
    """What was logged, without times and what is ours."""
    noise = ("runtime", "per_second", "rannc/", "preparation_time")
    return [{k: v for k, v in entry.items() if not any(n in k for n in noise)} for entry in trainer.state.log_history]


def same(actual, expected):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)


def weights(trainer):
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: value.detach().clone() for name, value in state.items()}


def same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "build, data, options",
    [
        (classifier, sentences, {}),
        (language_model, masked, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["classifier", "masked-lm"],
)
def test_training_and_evaluation_equal_trainer(tmp_path, build, data, options):
    options = dict(eval_dataset=data(6, 2), eval_strategy="epoch", lr_scheduler_type="cosine", **options)
    if build is classifier:
        options["compute_metrics"] = accuracy
    results = []
    for kind in (Trainer, RanncTrainer):
        trainer = make(kind, tmp_path / kind.__name__, build(), data(18), **dict(options))
        trainer.train()
        prediction = trainer.predict(data(5, 3))
        results.append((history(trainer), weights(trainer), prediction))
    assert isinstance(trainer.model_wrapped, RanncModel)
    same(results[1][0], results[0][0])
    same_weights(results[1][1], results[0][1])
    np.testing.assert_allclose(results[1][2].predictions, results[0][2].predictions, atol=1e-5)
    np.testing.assert_array_equal(results[1][2].label_ids, results[0][2].label_ids)
