"""Images, videos, sounds and time series in the shapes that a config tells."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .batches import Maker

SEVERAL_IMAGES = ("Idefics", "SmolVLM", "GraniteDocling", "LlavaNext", "LlavaOnevision", "Granite4Vision")
"""Their pixels have a dimension for the images, or tiles, of a sample."""
TILED = ("LlavaNext", "LlavaOnevision", "Granite4Vision")
"""They get a whole image and one tile, and the image's size."""
VIDEO = ("Video", "Vivit", "Timesformer", "TimeSformer", "VJEPA", "XCLIP", "Tvp", "InstructBlipVideo")
MEL_FIRST = ("Whisper", "Voxtral", "Flamingo", "Qwen2Audio", "GlmAsr", "Clvp", "Moss")
"""Their features have the mel bins before the time."""


def pair(value: Any, default: int = 32) -> tuple[int, int]:
    """Height and width."""
    if value is None:
        return default, default
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[-1])
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    return int(value), int(value)


def named(maker: Maker, names: tuple[str, ...]) -> bool:
    """Whether the class has any of these in its name."""
    return any(name in maker.name for name in names)


def add_special(maker: Maker) -> None:
    """Flags that make a model return its loss."""
    if "return_loss" in maker.takes:
        maker.fields["return_loss"] = True


# -- images ----------------------------------------------------------------------------------------------------------


def add_images(maker: Maker) -> None:
    """Pixels, and the tokens that stand for images in the text."""
    if maker.wants("pixel_values_videos") and not maker.wants("input_ids"):
        frames = int(maker.find("num_frames", "frames_per_clip") or 4)
        maker.fields["pixel_values_videos"] = maker.normal(
            maker.samples, frames, 3, *pair(maker.find("image_size", "crop_size"))
        )
    if not maker.wants("pixel_values"):
        return
    if maker.wants("image_grid_thw"):
        _grid(maker)
        return
    size = maker.find("image_size", "img_size", parts=("vision_config", "backbone_config"))
    if isinstance(size, int) and size < 16:
        size = 32
    channels = maker.find("num_channels", "in_channels", "in_chans", parts=("vision_config",)) or 3
    shape = [channels if isinstance(channels, int) else 3, *pair(size, 64)]
    if named(maker, VIDEO):
        shape.insert(0, int(maker.find("num_frames", "frames_per_clip") or 4))
    elif named(maker, SEVERAL_IMAGES):
        shape.insert(0, 2 if named(maker, TILED) else 1)
    maker.fields["pixel_values"] = maker.normal(maker.samples, *shape)
    if named(maker, TILED):
        maker.fields["image_sizes"] = torch.tensor([shape[-2:]] * maker.samples)
    if maker.wants("input_ids"):
        add_span(maker, image_token(maker), "get_image_features")
    if maker.wants("image_attention_mask"):
        count = maker.length + sum(maker.spans.values())
        maker.fields["image_attention_mask"] = torch.ones(maker.samples, count, 1, dtype=torch.long)


def image_token(maker: Maker) -> int | None:
    """The token that an image's features replace."""
    named_token = (maker.find("vocabulary_map") or {}).get("<image>")
    return named_token or maker.find(
        "image_token_id", "image_token_index", "image_patch_id", "img_token_id", "media_token_id"
    )


def add_span(maker: Maker, token: int | None, method: str) -> None:
    """As many tokens as there are features, which the model's own method tells."""
    if token is None:
        return
    queries = getattr(maker.config, "num_query_tokens", None)
    if isinstance(queries, int):
        pixels = maker.fields.get("pixel_values")
        maker.spans[token] = queries * (pixels.shape[1] if pixels is not None and pixels.dim() == 5 else 1)
        return
    for owner in (maker.model, getattr(maker.model, "model", None)):
        function = getattr(owner, method, None)
        if function is None:
            continue
        takes = inspect.signature(function).parameters
        inputs = {
            k: v.to(maker.dtype) if v.is_floating_point() else v
            for k, v in maker.fields.items()
            if k in takes and isinstance(v, torch.Tensor)
        }
        with torch.no_grad():
            maker.spans[token] = count_rows(function(**inputs), maker.samples)
            if any(k.endswith("_mask") for k in inputs):
                _count_each(maker, token, function, inputs)
        return


def _count_each(maker: Maker, token: int, function: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Note how many tokens each sample has, where sounds of different lengths have different numbers of features."""
    alone = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(maker.samples)]
    counts = [count_rows(function(**part), 1) for part in alone]
    if len(set(counts)) > 1:
        maker.spans[token], maker.uneven[token] = max(counts), torch.tensor(counts)


def count_rows(found: Any, samples: int) -> int:
    """Rows of features a sample."""
    value = getattr(found, "pooler_output", None)
    if value is None:
        value = getattr(found, "last_hidden_state", found)
    if isinstance(value, (list, tuple)):
        if len(value) == samples:
            return int(value[0].reshape(-1, value[0].shape[-1]).shape[0])
        value = value[0]
    return int(value.reshape(-1, value.shape[-1]).shape[0] // samples)


def _grid(maker: Maker) -> None:
    """Images as rows of patches, with the grid that they make: several rows a sample."""
    part = getattr(maker.config, "vision_config", maker.config)
    patch = pair(getattr(part, "patch_size", 8))[0]
    merge = getattr(part, "spatial_merge_size", None) or getattr(part, "merge_size", 2)
    frames = getattr(part, "temporal_patch_size", 1) or 1
    channels = getattr(part, "in_channels", None) or getattr(part, "in_chans", None) or getattr(part, "num_channels", 3)
    side = 2 * merge
    rows = side * side
    maker.fields["pixel_values"] = maker.normal(maker.samples * rows, channels * frames * patch * patch)
    maker.packed["pixel_values"] = rows
    maker.fields["image_grid_thw"] = torch.tensor([[1, side, side]] * maker.samples)
    add_span(maker, image_token(maker), "get_image_features")


# -- sounds ----------------------------------------------------------------------------------------------------------


def add_audio(maker: Maker) -> None:
    """Waveforms or mel features."""
    if maker.wants("input_values") and not maker.wants("past_values"):
        _waveform(maker)
    elif maker.wants("input_features"):
        _features(maker)


def _waveform(maker: Maker) -> None:
    bins, longest = getattr(maker.config, "num_mel_bins", None), getattr(maker.config, "max_length", None)
    if bins is not None and isinstance(longest, int) and not named(maker, ("Wav", "Speech")):
        maker.fields["input_values"] = maker.normal(maker.samples, longest, bins)
        return
    length = 1600
    one_channel = named(maker, ("PeAudio", "VibeVoice", "Encodec", "Dac"))
    shape = (maker.samples, 1, length) if one_channel else (maker.samples, length)
    maker.fields["input_values"] = maker.normal(*shape)
    if maker.wants("attention_mask") and not maker.wants("input_ids"):
        maker.fields["attention_mask"] = _shorter(maker, length, 160)


def _shorter(maker: Maker, length: int, step: int) -> torch.Tensor:
    mask = torch.ones(maker.samples, length, dtype=torch.long)
    for i in range(maker.samples):
        mask[i, length - step * (i % 3) :] = 0
    return mask


def _features(maker: Maker) -> None:
    parts = ("audio_config", "encoder_config")
    bins = maker.find(
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_feat_per_channel",
        "input_dim",
        "feature_size",
        parts=parts,
    )
    bins = int(bins or 16) * (4 if "GraniteSpeech5" in maker.name else 1)
    positions = maker.find("max_source_positions", parts=parts)
    first = named(maker, MEL_FIRST)
    length = 2 * int(positions) if first and positions else 64
    if "Clap" in maker.name:
        maker.fields["input_features"] = maker.normal(maker.samples, 1, 256, bins)
        return
    shape = (maker.samples, bins, length) if first else (maker.samples, length, bins)
    maker.fields["input_features"] = maker.normal(*shape)
    for name in ("input_features_mask", "feature_attention_mask"):
        maker.put(name, lambda: _shorter(maker, length, 8))
    if maker.wants("input_ids"):
        token = maker.find("audio_token_id", "audio_token_index")
        add_span(maker, token, "get_audio_features")
    else:
        maker.put("attention_mask", lambda: _shorter(maker, length, 8))


# -- time series -----------------------------------------------------------------------------------------------------


def add_series(maker: Maker) -> None:
    """Past values of time series."""
    if not maker.wants("past_values"):
        return
    length = maker.find("context_length", "prediction_length") or 32
    channels = maker.find("num_input_channels")
    if channels is not None:
        maker.fields["past_values"] = maker.normal(maker.samples, int(length), int(channels))
        return
    config = maker.config
    lags = max(getattr(config, "lags_sequence", None) or [0])
    past, future = int(length) + lags, int(maker.find("prediction_length", "horizon_length") or 8)
    features = int(getattr(config, "num_time_features", 0))
    maker.fields["past_values"] = maker.normal(maker.samples, past)
    maker.put("past_time_features", lambda: maker.normal(maker.samples, past, features))
    maker.put("past_observed_mask", lambda: torch.ones(maker.samples, past))
    maker.put("future_time_features", lambda: maker.normal(maker.samples, future, features))
