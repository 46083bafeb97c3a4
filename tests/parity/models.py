"""Small models of the kinds that must train exactly: encoder, tied decoder, rotary decoder, encoder-decoder, vision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import nn
from torch.nn import functional

Batch = dict[str, torch.Tensor]
VOCABULARY = 100


@dataclass(frozen=True)
class Case:
    """A model without dropout, and batches for it: padded, with uneven numbers of labels."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in training mode, its weights the same at every call."""
        torch.manual_seed(0)
        return self.build().to(dtype).train()

    def batch_as(self, samples: int, dtype: torch.dtype = torch.float64) -> Batch:
        """A batch whose floating fields have `dtype`."""
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.batch(samples).items()}


def tokens(samples: int, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, a mask that pads samples unevenly, and labels for two fifths of the kept tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(samples):
        mask[i, length - i % 4 :] = 0
    labelled = (torch.rand(samples, length, generator=generator) < 0.4) & (mask > 0)
    return ids, mask, torch.where(labelled, ids, -100)


def language_batch(samples: int, length: int = 12) -> Batch:
    """A padded batch for a language model."""
    ids, mask, labels = tokens(samples, length)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pretraining_batch(samples: int, length: int = 12) -> Batch:
    """A padded batch for masked language modelling with next sentence prediction."""
    batch = language_batch(samples, length)
    types = (torch.arange(length) >= length // 2).long().expand(samples, -1).contiguous()
    return {**batch, "token_type_ids": types, "next_sentence_label": torch.arange(samples) % 2}


def image_batch(samples: int) -> Batch:
    """Random images of two classes."""
    pixels = torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(samples) % 2}


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **ignored: object) -> torch.Tensor:
    """The causal loss of Transformers without its cast to float32, which would hide bugs below 1e-7."""
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return functional.cross_entropy(logits.view(-1, vocab_size), shifted.view(-1))


def _bert() -> nn.Module:
    return hf.BertForPreTraining(
        hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.loss_function = next_token_loss
    return model


def _llama() -> nn.Module:
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=64,
        )
    )  # fmt: skip
    model.loss_function = next_token_loss
    return model


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions with a shortcut; writes in place, as torchvision's blocks do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, channels) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norms[0](self.first(x)), inplace=True)
        y = self.norms[1](self.second(y))
        y += x
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    """A residual network that returns a tuple (loss, logits), as plain modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.layers = nn.Sequential(*(Residual(4) for _ in range(4)))
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.layers(self.stem(pixel_values)).mean((2, 3)))
        return functional.cross_entropy(logits, labels), logits


CASES = {
    "bert": Case(_bert, pretraining_batch),
    "gpt2": Case(_gpt2, language_batch),
    "llama": Case(_llama, language_batch),
    "t5": Case(_t5, language_batch),
    "vit": Case(_vit, image_batch),
    "resnet": Case(ResNet, image_batch),
}
