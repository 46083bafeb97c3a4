"""What the rules of `shrink` cannot know, by model type: sizes that depend on one another in a model's own way."""

from __future__ import annotations

from typing import Any

_EFFICIENT = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
_FORECAST = {"prediction_length": 8, "context_length": 16}
_LEVELS = {"encoder_in_channels": (32, 64, 128), "decoder_in_channels": (64, 64, 64)}
_SWIN = {"depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4), "window_size": 2, "image_size": 64, "embed_dim": 16}


def _rotary(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary parameters for several axes, over half of a head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


_TILES = {"image_grid_pinpoints": [[32, 32]]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 320},
    "align_vision_model": _EFFICIENT,
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": _FORECAST,
    "bit": {"num_groups": 4},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 5,
            **{f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(i))}Z": 60 + i for i in range(16)},
        }
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        }
    },
    "d_fine": _LEVELS,
    "deepseek_ocr2_text": {"mlp_layer_types": lambda layers: ["dense"] + ["sparse"] * (layers - 1)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deimv2": _LEVELS,
    "donut-swin": _SWIN,
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": (0, 1, 2, 3)},
    "efficientnet": _EFFICIENT,
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "funnel": {"block_sizes": lambda layers: [layers // 2] * 2, "block_repeats": [1, 1], "d_head": 16, "d_inner": 64},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n": {"vision_soft_tokens_per_image": 4, "audio_soft_tokens_per_image": 8},
    "gemma3n_text": {"intermediate_size": lambda layers: [64] * layers},
    "gemma3n_vision": {
        "architecture": "resnet18",
        "model_args": {"channels": (16, 16, 32, 64), "layers": (1, 1, 1, 1)},
    },
    "granite4_vision": _TILES,
    "hgnet_v2": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 16, 32, 64),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 32, 64, 128),
        "stage_num_blocks": (1, 1, 1, 1),
        "stage_numb_of_layers": (1, 1, 1, 1),
        "hidden_sizes": [16, 32, 64, 128],
        "depths": (1, 1, 1, 1),
    },
    "lw_detr": {"projector_scale_factors": [1.0]},
    "informer": _FORECAST,
    "levit": {"image_size": 64, "patch_size": 16},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "lw_detr_vit": {"num_windows": 4},
    "mistral4": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h": {"n_groups": 2, "num_key_value_heads": 2},
    "omdet-turbo": {"encoder_in_channels": (32, 64, 128)},
    "rt_detr": _LEVELS,
    "pp_doclayout_v2": _LEVELS,
    "pp_doclayout_v3": _LEVELS,
    "rt_detr_v2": _LEVELS,
    "dots3_note_vision_encoder": {
        "mlp_layer_types": lambda layers: ["dense", "sparse"] * (layers // 2),
        "per_layer_config": lambda layers: {
            i: {"num_local_experts": 4, "num_experts_per_tok": 2} for i in range(1, layers, 2)
        },
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "esm": {"vocab_size": 128, "mask_token_id": 4},
    "fsmt": {"src_vocab_size": 128, "tgt_vocab_size": 128, "langs": ["en", "de"]},
    "gpt_neo": {"attention_types": lambda layers: [[["global", "local"], layers // 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 32, "visual_bbox": False},
    "lfm2_moe": {"layer_types": lambda layers: ["conv", "full_attention"] * (layers // 2)},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "swin": _SWIN,
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "textnet": {"stem_out_channels": 16},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": (32, 64)},
    "udop": {"decoder_start_token_id": 0},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vitmatte": {"fusion_hidden_sizes": [32, 16, 16, 8]},
    "wav2vec2-bert": {"vocab_size": 128},
    "clap_audio_model": {
        "spec_size": 64,
        "patch_embeds_hidden_size": 16,
        "depths": (1, 1, 1, 1),
        "num_attention_heads": (2, 2, 4, 4),
        "hidden_size": 128,
        "window_size": 2,
        "num_hidden_layers": 4,
    },
    "emu3": {"vocabulary_map": {}},
    "ernie4_5_vl_moe_text": _rotary(2, 2, 4),
    "glm4v_text": _rotary(4, 2, 2),
    "glm4v_moe_text": _rotary(2, 1, 1, partial_rotary_factor=0.5),
    "glm_ocr_text": _rotary(4, 2, 2),
    "hunyuan_vl_text": {"head_dim": 16, **_rotary(4, 2, 2)},
    "qwen2_vl_text": _rotary(4, 2, 2),
    "qwen2_5_vl_text": _rotary(4, 2, 2),
    "qwen2_5_omni_text": _rotary(4, 2, 2),
    "qwen3_vl_text": _rotary(4, 2, 2),
    "qwen3_vl_moe_text": _rotary(4, 2, 2),
    "qwen3_omni_moe_text": _rotary(4, 2, 2),
    "paddleocr_vl_text": _rotary(4, 2, 2),
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "zamba": {"layers_block_type": lambda layers: ["linear_attention", "hybrid"] * (layers // 2)},
    "zamba2": {
        "layers_block_type": lambda layers: ["linear_attention", "hybrid"] * (layers // 2),
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "xmod": {"default_language": "en_XX"},
    "time_series_transformer": _FORECAST,
}
"""Arguments of a type's config; a callable gets the number of layers."""
