"""Small models and data for tests of the trainers, and how to compare what two of them did."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    TrainingArguments,
)

from rannc_hf import RanncTrainer, RanncTrainingArguments

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


class Regression(nn.Module):
    """Not a model of Transformers, and captured fast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, inputs, labels=None):
        outputs = self.second(torch.tanh(self.first(inputs))).squeeze(-1)
        result = {"logits": outputs}
        return result if labels is None else {"loss": nn.functional.mse_loss(outputs, labels), **result}


def points(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"inputs": p, "labels": p.sum()} for p in torch.randn(count, 4, generator=generator)]


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


_OF_TRAINER = ("compute_metrics", "callbacks", "optimizers", "model_init", "eval_dataset", "compute_loss_func")


def make(kind, folder, model, data, rannc=None, **options):
    """A trainer of class `kind`; `options` are its own and those of its arguments."""
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "adam_epsilon": 1e-6,
        "save_strategy": "no",
    }
    extra = {name: options.pop(name) for name in list(options) if name in _OF_TRAINER}
    arguments |= options
    AcceleratorState._reset_state(reset_partial_state=True)
    ours = issubclass(kind, RanncTrainer)
    args = RanncTrainingArguments(rannc=rannc, **arguments) if ours else TrainingArguments(**arguments)
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
