"""Inputs for any model: what its `forward` takes, in shapes that its config tells, padded unevenly, with targets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SAMPLES, LENGTH = 6, 12
FIRST_WORD = 48
"""Token ids below are special."""


@dataclass
class Maker:
    """Makes the batch of one model."""

    model: nn.Module
    name: str
    samples: int = SAMPLES
    length: int = LENGTH
    fields: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    """Rows a sample, of fields that have several in dimension 0."""
    spans: dict[int, int] = field(default_factory=dict)
    """How many of which special tokens stand for a sample's images and sounds, at most."""
    uneven: dict[int, torch.Tensor] = field(default_factory=dict)
    """How many in each sample, where samples differ."""

    def __post_init__(self) -> None:
        self.config: Any = self.model.config
        self.takes = inspect.signature(self.model.forward).parameters
        self.generator = torch.Generator().manual_seed(0)

    # -- numbers -----------------------------------------------------------------------------------------------------

    def ids(self, *shape: int, high: int | None = None, low: int = FIRST_WORD) -> torch.Tensor:
        high = high if high is not None else self.vocabulary
        return torch.randint(min(low, high // 2), high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    @property
    def vocabulary(self) -> int:
        return int(self.find("vocab_size", parts=("text_config", "llm_config", "decoder", "decoder_config")) or 128)

    @property
    def has_decoder(self) -> bool:
        """Whether labels are a decoder's, of their own length."""
        config = getattr(self.config, "text_config", self.config)
        return bool(getattr(config, "is_encoder_decoder", False) or getattr(self.config, "is_encoder_decoder", False))

    def find(self, *names: str, parts: tuple[str, ...] = ()) -> Any:
        """The first of the attributes that the config, or one nested in it, has."""
        for config in [*(getattr(self.config, p, None) for p in parts), self.config, *nested(self.config)]:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return None

    def padding(self, length: int, least: int = 3) -> torch.Tensor:
        """A mask that pads samples unevenly, on the right."""
        mask = torch.ones(self.samples, length, dtype=torch.long)
        for i in range(self.samples):
            mask[i, max(length - i % 4, least) :] = 0
        return mask

    def classes(self) -> torch.Tensor:
        return torch.arange(self.samples) % max(int(getattr(self.config, "num_labels", 2) or 2), 2)

    def wants(self, *names: str) -> bool:
        return any(n in self.takes for n in names)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def put(self, name: str, make: Callable[[], Any]) -> None:
        if name in self.takes and name not in self.fields:
            self.fields[name] = make()


def nested(config: Any) -> list[Any]:
    """All configs inside a config."""
    from transformers import PreTrainedConfig

    own = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    return [*own, *(c for part in own for c in nested(part))]


def make_batch(model: nn.Module, text_only: bool = False) -> Maker:
    """The batch, as `fields` by name; `text_only` leaves out what else a language model could take."""
    from .modalities import add_audio, add_images, add_series, add_special
    from .targets import add_targets

    maker = Maker(model, type(model).__name__)
    add_special(maker)
    if not text_only:
        add_images(maker)
        add_audio(maker)
        add_series(maker)
    add_text(maker)
    add_targets(maker)
    return maker


def add_text(maker: Maker) -> None:
    """Token ids and their mask, with tokens for the features of images and sounds."""
    if not maker.wants("input_ids") or "input_ids" in maker.fields:
        return
    spans = maker.spans
    ids = maker.ids(maker.samples, maker.length)
    mask = maker.padding(maker.length)
    prefix = [torch.full((maker.samples, n), token, dtype=torch.long) for token, n in spans.items()]
    for place, token in enumerate(spans):
        if token in maker.uneven:
            words = torch.arange(spans[token]) >= maker.uneven[token][:, None]
            prefix[place] = torch.where(words, maker.ids(maker.samples, spans[token]), prefix[place])
    ids = torch.cat([*prefix, ids], 1) if prefix else ids
    mask = torch.cat([torch.ones(maker.samples, ids.shape[1] - maker.length, dtype=torch.long), mask], 1)
    if maker.name.endswith("MultipleChoice"):
        # Equal choices would have no gradients.
        ids, mask = torch.stack([ids, ids.roll(1, -1)], 1), mask.unsqueeze(1).repeat(1, 2, 1)
    pad = maker.find("pad_token_id")
    maker.fields["input_ids"] = ids.masked_fill(mask == 0, pad if isinstance(pad, int) and pad >= 0 else 0)
    maker.put("attention_mask", lambda: mask)
    if "token_type_ids" in maker.takes and (maker.find("type_vocab_size") or 0) > 1:
        half = (torch.arange(ids.shape[-1]) >= ids.shape[-1] // 2).long()
        maker.fields["token_type_ids"] = half.expand(ids.shape).contiguous()
    elif "token_type_ids" in maker.takes and spans:
        maker.fields["token_type_ids"] = sum((ids == token).long() for token in spans)
    if "image_grid_thw" in maker.fields or "mm_token_type_ids" in maker.takes:
        kinds = torch.zeros_like(ids)
        maker.fields["mm_token_type_ids"] = sum(((ids == token).long() for token in spans), kinds)
    maker.put("qformer_input_ids", lambda: maker.ids(maker.samples, 4))
    maker.put("qformer_attention_mask", lambda: torch.ones(maker.samples, 4, dtype=torch.long))
    if maker.wants("visual_feats"):
        maker.fields["visual_feats"] = maker.normal(maker.samples, 5, int(maker.config.visual_feat_dim))
        maker.fields["visual_pos"] = maker.uniform(maker.samples, 5, 4)
    maker.put("bbox", lambda: torch.tensor([1, 2, 20, 30]).expand(*ids.shape, 4).contiguous())
