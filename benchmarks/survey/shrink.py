"""Tiny configs: the defaults of a type with few layers, narrow widths and no dropout, over all nested configs."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .overrides import OVERRIDES

WIDTH, INNER, HEADS, HEAD, VOCABULARY = 64, 64, 4, 16, 128
Rule = tuple[str, Any]


def _less(value: int) -> Any:
    return lambda old: min(old, value)


RULES: tuple[Rule, ...] = (
    # Left as they are, though their names look like widths.
    (r"(dropout|layerdrop|drop_path|pdrop|drop)", lambda old: 0 if isinstance(old, int) else 0.0),
    (r"^(num_labels|type_vocab_size|in_channels|num_channels|audio_channels|input_dim|temporal_patch_size)$", None),
    (r"^(sampling_rate|sample_rate|hop_length|frame_rate|max_size|fft_size|n_fft|fps|scale|scale_factor)$", None),
    (r"(kernel|stride|dilation|rate|ratio|factor|scale|temperature|theta|coef|cost|prob|eps|std|max_distance)", None),
    (r"^mask_(time|feature)_(length|min_masks)$", None),
    # Sizes of what comes in.
    (r"^(image_size|pretrain_image_size|img_size)$", "image"),
    (r"patch_size$", "patch"),
    (r"vocab_size$|^n_vocab$|^vocab_size_per_layer_input$", "vocabulary"),
    (r"^hidden_size_per_layer_input$", _less(HEAD)),
    (r"^num_kv_shared_layers$", _less(0)),
    (r"^(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length|context_length"
     r"|max_2d_position_embeddings|max_target_positions)$", _less(256)),
    (r"^(num_mel_bins|input_feat_per_channel)$", _less(16)),
    (r"^upsample_groups$", _less(WIDTH)),
    # Depth.
    (r"^(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_(en|de)coder_layers|depth"
     r"|num_hidden_groups|resampler_depth|num_blocks|attention_layers|layers"
     r"|(\w+_)?(num_hidden_layers|num_layers)|layers_count)$", "layers"),
    (r"^depths$", "depths"),
    # Experts.
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|expert_num|n_experts|num_routed_experts)$",
     _less(4)),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|experts_per_token|topk_group|moe_top_k"
     r"|num_selected_experts|top_k)$", _less(2)),
    (r"^(n_group|num_expert_group)$", _less(2)),
    (r"^(first_k_dense_replace|moe_layer_start_index|num_dense_layers|first_dense_layers)$", _less(1)),
    # Heads.
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|num_key_value_groups|num_query_groups)$", "kv_heads"),
    (r"(num_attention_heads|attention_heads|n_heads?|num_heads|num_attn_heads|linear_num_(key|value)_heads)$", "heads"),
    (r"^(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|head_dim|global_head_dim|d_kv|dim_head|index_head_dim"
     r"|linear_(key|value)_head_dim|linear_head_dim|attention_head_dim|kv_channels|swa_head_dim|rotary_dim"
     r"|v_dim|qk_dim)$", _less(HEAD)),
    (r"^qk_head_dim$", lambda old: 2 * HEAD),
    # Widths.
    (r"(intermediate_size|ffn_dim|inner_dim|n_inner|mlp_dim|dim_feedforward|d_ff|ffn_hidden_size|ffn_size|hidden_dim"
     r"|intermediate_dim|mlp_hidden_size|inner_hidden_size)$", _less(INNER)),
    (r"^(conv_dim|tdnn_dim|hidden_sizes|embed_dims?|dims|widths|neck_hidden_sizes|encoder_hidden_sizes)$", "widths"),
    (r"(size|dim|width|channels|embd|d_model|hidden|rank|filters|units)$", "width"),
    (r"^(num_queries|num_query_tokens|num_latents|num_detection_tokens|two_stage_num_proposals|num_denoising"
     r"|train_num_points|resampler_n_latents|num_prototypes|codebook_size|num_embeddings)$", _less(16)),
    (r"^(sliding_window|attention_window_size|window_attention|local_attention|attention_chunk_size|attention_window)$",
     _less(8)),
    (r"^(chunk_size|mamba_chunk_size|block_size|lsh_attn_chunk_length|local_attn_chunk_length)$", _less(8)),
    (r"^(index_topk)$", _less(16)),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in RULES)
_IDS = re.compile(r"(_token_id|_token_index|_index|_id|_ids)$")
_TOKEN = re.compile(r"(_token_ids?|_token_index|_token_indices)$")
_FIXED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "sep_token_id": 2}
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1],
           "layer_type": "basic"}  # fmt: skip
"""Stands for backbones of timm, which need not be installed."""
_NEEDED = {"pad_token_id", "decoder_start_token_id", "image_token_id", "image_token_index", "video_token_id",
           "audio_token_id"}  # fmt: skip
"""Given a value where the default is None."""
_BASE = set(vars(PreTrainedConfig()))


def tiny_config(model_type: str, layers: int) -> Any:
    """A config of the type with `layers` layers in each of its parts."""
    config_class = CONFIG_MAPPING[model_type]
    override = dict(OVERRIDES.get(model_type, {}))
    arguments = _merged(shrunk(_default(config_class), layers), _resolved(override, layers))
    arguments = {k: v for k, v in arguments.items() if v is not _DROP}
    config = config_class(**arguments)
    settle(config)
    return config


_DROP = object()
_PARTS = {
    "encoder-decoder": ("bert", "bert"),
    "speech-encoder-decoder": ("wav2vec2", "bert"),
    "vision-encoder-decoder": ("vit", "bert"),
}
"""Encoder and decoder of types that put two models together: not all versions of Transformers choose them."""


def _default(config_class: Any) -> Any:
    parts = _PARTS.get(config_class.model_type)
    if parts is None:
        return config_class()
    encoder, decoder = (CONFIG_MAPPING[part]() for part in parts)
    return config_class.from_encoder_decoder_configs(encoder, decoder)


def _resolved(value: Any, layers: int) -> Any:
    if isinstance(value, dict):
        return {k: _resolved(v, layers) for k, v in value.items()}
    return value(layers) if callable(value) else value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def shrunk(config: Any, layers: int) -> dict[str, Any]:
    """Arguments that make a smaller config of the same class."""
    arguments: dict[str, Any] = {}
    specials = iter(range(4, 40))
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            arguments[name] = {**_RESNET, "out_indices": list(value.out_indices)}
        elif isinstance(value, PreTrainedConfig):
            small = _merged(shrunk(value, layers), _resolved(OVERRIDES.get(value.model_type, {}), layers))
            arguments[name] = {"model_type": value.model_type, **small, **_features(value, small)}
        elif value is None and name in _NEEDED:
            arguments[name] = _FIXED.get(name, next(specials))
        elif isinstance(value, bool) or value is None or name.startswith("_"):
            continue
        elif name in ("rope_parameters", "rope_scaling"):
            arguments[name] = _rope(value)
        elif name == "mrope_section":
            arguments[name] = _rope({name: value})[name]
        elif _TOKEN.search(name):
            arguments[name] = _token(name, value, specials)
        elif name in _BASE and name not in ("chunk_size_feed_forward",):
            continue
        else:
            new = _small(name, value, config, layers)
            if new is not None and new != value:
                arguments[name] = new
    return arguments


def _features(config: Any, small: dict[str, Any]) -> dict[str, Any]:
    """Where a backbone's features are taken: as many as before, and layers enough for them."""
    indices = getattr(config, "out_indices", None)
    if not indices or not hasattr(config, "out_features"):
        return {}
    if "num_hidden_layers" not in small:
        return {"out_indices": list(indices)}
    if "depths" in vars(config) or "stage_names" not in vars(config):
        return {"out_indices": list(indices)}
    count = len(indices)
    return {"num_hidden_layers": max(count, small["num_hidden_layers"]), "out_indices": list(range(1, count + 1))}


def _rope(value: Any) -> Any:
    """Rotary parameters for the smaller heads, by layer type or for all layers."""
    if not isinstance(value, dict):
        return value
    if any(isinstance(v, dict) for v in value.values()):
        return {k: _rope(v) for k, v in value.items()}
    result = {k: v for k, v in value.items() if v is not None}
    half = int(HEAD * (result.get("partial_rotary_factor") or 1.0)) // 2
    if result.get("mrope_section"):
        first, second, _ = result["mrope_section"]
        part = half // 4
        result["mrope_section"] = [part, part, half - 2 * part] if first == second else [half - 2 * part, part, part]
    for name in ("short_factor", "long_factor"):
        if isinstance(result.get(name), list):
            result[name] = [1.0 + i for i in range(half)]
    return result


def _token(name: str, value: Any, specials: Any) -> Any:
    if name in _FIXED:
        return _FIXED[name] if isinstance(value, int) else [_FIXED[name]]
    return next(specials) if isinstance(value, int) else value


def _small(name: str, value: Any, config: Any, layers: int) -> Any:
    for pattern, rule in _COMPILED:
        if not pattern.search(name):
            continue
        if rule is None:
            return None
        if callable(rule):
            return rule(value) if isinstance(value, (int, float)) else None
        return _kv_heads(name, value, config) if rule == "kv_heads" else _NAMED[rule](value, layers)
    return None


def _image(value: Any, layers: int) -> Any:
    small = 32
    if isinstance(value, int):
        return min(value, small)
    return type(value)(small for _ in value)


def _patch(value: Any, layers: int) -> Any:
    if isinstance(value, int):
        return 8 if value >= 8 else value
    return type(value)(8 if v >= 8 else v for v in value) if all(isinstance(v, int) for v in value) else None


def _width(value: Any, layers: int) -> Any:
    return min(value, WIDTH) if isinstance(value, int) else None


def _widths(value: Any, layers: int) -> Any:
    if isinstance(value, int):
        return WIDTH if value > WIDTH else value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
        first = min(value)
        return type(value)(max(v * 16 // first // 16 * 16, 16) if first > 16 else v for v in value)
    return None


def _heads(value: Any, layers: int) -> Any:
    if isinstance(value, int):
        return min(value, HEADS)
    return type(value)(min(v, 2) for v in value) if all(isinstance(v, int) for v in value) else None


def _kv_heads(name: str, value: Any, config: Any) -> Any:
    heads = vars(config).get(name.replace("num_key_value_heads", "num_attention_heads"))
    if not isinstance(value, int):
        return None
    return HEADS if value == heads else min(value, 2)


def _layers(value: Any, layers: int) -> Any:
    return min(value, layers) if isinstance(value, int) else None


def _depths(value: Any, layers: int) -> Any:
    return type(value)(min(v, 1) for v in value) if isinstance(value, (list, tuple)) else None


def _vocabulary(value: Any, layers: int) -> Any:
    return VOCABULARY if isinstance(value, int) and value > VOCABULARY else None


_NAMED = {
    "image": _image, "patch": _patch, "width": _width, "widths": _widths, "heads": _heads, 
    "layers": _layers, "depths": _depths, "vocabulary": _vocabulary,
}  # fmt: skip


def settle(config: Any) -> None:
    """Turn off what is random, and say how a decoder starts, in all nested configs; not all are arguments."""
    if getattr(config, "is_encoder_decoder", False) or type(config).__name__.endswith("EncoderDecoderConfig"):
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, 0)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            settle(value)
        elif re.search(r"(dropout|layerdrop|drop_path|pdrop|drop_rate)", name) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name in ("apply_spec_augment", "use_cache"):
            setattr(config, name, False)
        elif name in ("mask_time_prob", "mask_feature_prob"):
            setattr(config, name, 0.0)
        elif name == "drop_path_rate" and isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(0.0 for _ in value))
