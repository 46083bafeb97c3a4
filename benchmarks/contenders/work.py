"""The work that all contenders do: a BERT whose weights depend on nothing but their names, and its batch.

Weights are made by name, on the device, module by module: a contender may hold the whole model, some layers of it, or
shards, and still starts from the same values as all others.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForPreTraining

LEARNING_RATE = 1e-5
"""There is no warm-up: with 1e-4 the third step's loss jumps, and two runs of DDP are 0.9 apart."""
LABELLED = 0.15
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """Sizes of a BERT."""

    layers: int
    hidden: int
    heads: int
    length: int = 512
    vocabulary: int = 30522

    def config(self, dropout: float) -> BertConfig:
        return BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )

    @property
    def flops_per_sample(self) -> float:
        """FLOPs of forward and backward: matrix products of layers, transform and decoder, and attention."""
        h, s = self.hidden, self.length
        return s * (6 * (self.layers * 12 * h * h + h * h + h * self.vocabulary) + 12 * self.layers * s * h)


def blank(model: Model, dropout: float) -> BertForPreTraining:
    """The model in training mode, without memory for its weights."""
    with torch.device("meta"):
        return BertForPreTraining(model.config(dropout)).train()


def fill(module: nn.Module, prefix: str, device: torch.device) -> None:
    """Give `module`, whose name in the model is `prefix`, memory on `device` and the weights of its names."""
    module.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters(prefix):
            _fill_parameter(name, parameter)
        for name, buffer in module.named_buffers(prefix):
            _fill_buffer(name, buffer)


def fill_all(model: BertForPreTraining, device: torch.device) -> BertForPreTraining:
    """The whole model on `device`."""
    fill(model, "", device)
    model.tie_weights()
    return model


def _fill_parameter(name: str, parameter: torch.Tensor) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif name.endswith("LayerNorm.weight"):
        parameter.fill_(1.0)
    else:
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.normal_(0.0, 0.02, generator=generator)


def _fill_buffer(name: str, buffer: torch.Tensor) -> None:
    if name.endswith("position_ids"):
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
    else:
        assert name.endswith("token_type_ids"), name
        buffer.zero_()


def make_batch(model: Model, unique: int, samples: int, device: torch.device) -> Batch:
    """`unique` random samples without padding, repeated to `samples`; 15 % of each sample's tokens have a label.

    So the loss of the whole batch is the same for every number of samples, and whether means are taken over
    microbatches, over ranks or over all of it.
    """
    assert samples % unique == 0, f"{samples} samples cannot be {unique} samples repeated"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.vocabulary, (unique, model.length), generator=generator)
    chosen = torch.rand(ids.shape, generator=generator).topk(round(LABELLED * model.length), dim=1).indices
    labels = torch.full_like(ids, -100).scatter(1, chosen, ids.gather(1, chosen))
    batch = {
        "input_ids": ids,
        "labels": labels,
        "next_sentence_label": torch.randint(0, 2, (unique,), generator=generator),
    }
    repeat = samples // unique
    return {k: v.repeat(repeat, *[1] * (v.dim() - 1)).to(device) for k, v in batch.items()}


def part(batch: Batch, index: int, size: int) -> Batch:
    """Samples `index * size` to `(index + 1) * size`."""
    return {k: v[index * size : (index + 1) * size] for k, v in batch.items()}


def pretraining_loss(
    words: torch.Tensor, sentences: torch.Tensor, labels: torch.Tensor, following: torch.Tensor
) -> Any:
    """The loss of BertForPreTraining, for those who run its modules by hand."""
    return functional.cross_entropy(words.flatten(0, 1), labels.flatten()) + functional.cross_entropy(
        sentences, following
    )


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
