"""Targets for the head that a model's class has."""

from __future__ import annotations

import torch

from .batches import Maker

_CLASSES = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification",
            "NextSentencePrediction", "ForXVector", "MultipleChoice", "ImageClassificationWithTeacher")  # fmt: skip


def add_targets(maker: Maker) -> None:
    """Labels, or whatever the class calls them."""
    name = maker.name
    if "start_positions" in maker.takes and "labels" not in maker.takes:
        maker.fields["start_positions"] = torch.arange(maker.samples) % 3
        maker.fields["end_positions"] = torch.arange(maker.samples) % 3 + 1
    if "future_values" in maker.takes:
        _future(maker)
    if "mask_labels" in maker.takes:
        _masks(maker)
    if "bool_masked_pos" in maker.takes and "MaskedImage" in name:
        _patches(maker)
    if "labels" not in maker.takes:
        return
    if any(name.endswith(k) or k in name for k in _CLASSES):
        maker.fields["labels"] = maker.classes()
    elif any(k in name for k in ("CTC", "RNNT", "TDT")):
        labels = maker.fields["labels"] = maker.ids(maker.samples, 4)
        maker.put("decoder_input_ids", lambda: torch.cat([torch.zeros_like(labels[:, :1]), labels], 1))
    elif "Segmentation" in name:
        _segmentation(maker)
    elif "Detection" in name and "input_ids" not in maker.fields:
        _boxes(maker)
    elif "Depth" in name:
        images = maker.fields["pixel_values"]
        maker.fields["labels"] = maker.uniform(maker.samples, *images.shape[-2:]) + 0.1
    elif "input_ids" in maker.fields:
        _tokens(maker)
    else:
        maker.fields["labels"] = maker.ids(maker.samples, maker.length) if maker.find("vocab_size") else maker.classes()


def _tokens(maker: Maker) -> None:
    ids = maker.fields["input_ids"]
    mask = maker.fields.get("attention_mask", torch.ones_like(ids))
    if "TokenClassification" in maker.name:
        classes = int(maker.config.num_labels)
        maker.fields["labels"] = torch.randint(0, classes, ids.shape, generator=maker.generator)
        return
    chosen = (torch.rand(ids.shape, generator=maker.generator) < 0.6) & (mask > 0)
    for token in maker.spans:
        chosen &= ids != token
    if "decoder_input_ids" in maker.takes and maker.has_decoder:
        labels = maker.ids(maker.samples, maker.length - 3)
        labels[1::2, -2:] = -100
        maker.fields["labels"] = labels
        return
    maker.fields["labels"] = torch.where(chosen, ids, -100)


def _future(maker: Maker) -> None:
    length = int(maker.find("prediction_length", "horizon_length") or 8)
    past = maker.fields["past_values"]
    shape = (maker.samples, length, past.shape[-1]) if past.dim() == 3 else (maker.samples, length)
    maker.fields["future_values"] = maker.normal(*shape)


def _segmentation(maker: Maker) -> None:
    h, w = maker.fields["pixel_values"].shape[-2:]
    classes = int(maker.config.num_labels)
    maker.fields["labels"] = torch.randint(0, classes, (maker.samples, h, w), generator=maker.generator)


def _boxes(maker: Maker) -> None:
    classes = int(maker.config.num_labels)
    maker.fields["labels"] = [
        {
            "class_labels": torch.randint(0, classes, (i % 2 + 1,), generator=maker.generator),
            "boxes": 0.25 + 0.25 * maker.uniform(i % 2 + 1, 4),
        }
        for i in range(maker.samples)
    ]


def _masks(maker: Maker) -> None:
    pixels = maker.fields["pixel_values"] if "pixel_values" in maker.fields else maker.fields["pixel_values_videos"]
    h, w = pixels.shape[-2:]
    maker.fields["mask_labels"] = [(maker.uniform(2, h, w) < 0.5).float() for _ in range(maker.samples)]
    maker.fields["class_labels"] = [torch.tensor([0, 1]) for _ in range(maker.samples)]


def _patches(maker: Maker) -> None:
    size, patch = maker.find("image_size"), maker.find("patch_size")
    count = (int(size) // int(patch)) ** 2
    maker.fields["bool_masked_pos"] = torch.arange(count).expand(maker.samples, -1) % 3 == 0
