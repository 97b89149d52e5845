"""Corrections of the general rules for small configurations, per family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlcache_fx.testing.survey.configs import HIDDEN

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [2, 3, 3]}
TILES = [[24, 24], [24, 48], [48, 24], [48, 48]]

SPARSE = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 4}
"""Sizes of an index that chooses tokens to attend to."""

MINICPM = {"image_token_id": 190, "video_token_id": 191, "insert_layer_id": 0}
VICUNA = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
"""The decoder of InstructBLIP's checkpoints; the default, OPT, is that of BLIP-2."""

CODES = range(16)
"""Codes of an image: encoders that turn images into tokens of the vocabulary."""

CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {36: 9}},
    "blip-2": {"num_query_tokens": 9, "image_token_index": 190},
    "chameleon": {
        "image_token_id": 190,
        "vocabulary_map": {"<image>": 190}
        | {f"IMGIMG{'ABCDEFGHIJ'[c // 10]}{'ABCDEFGHIJ'[c % 10]}Z": 100 + c for c in CODES},
        "vq_config.channel_multiplier": [1, 1, 1],
    },
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": MROPE}},
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "vision_config.sam_config.downsample_channels": [32, 32],
    },
    "diffusion_gemma": {
        "canvas_length": 8,
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dots3_note": {
        "vision_config.num_local_experts": 4,
        "vision_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.per_layer_config": {},
        "audio_config.downsample_hidden_size": 8,
        "text_config.layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
    },
    "emu3": {
        "image_token_id": 190,
        "vocabulary_map": {"<image>": 190, "<|extra_200|>": 191}
        | {f"<|visual token {c:06d}|>": 100 + c for c in CODES},
        "vq_config.channel_multiplier": [1, 1, 1],
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    "florence2": {
        "vision_config.depths": [1, 1],
        "vision_config.patch_size": [7, 3],
        "vision_config.patch_stride": [4, 2],
        "vision_config.patch_padding": [3, 1],
        "vision_config.patch_prenorm": [False, True],
        "vision_config.embed_dim": [32, 32],
        "vision_config.num_heads": [2, 2],
        "vision_config.num_groups": [2, 2],
        "vision_config.window_size": 3,
    },
    "gemma3": {"mm_tokens_per_image": 9},
    "gemma3n": {"vision_soft_tokens_per_image": 36},
    "gemma4_unified": {"vision_config.pooling_kernel_size": 1},
    "glm46v": {"text_config.rope_parameters": MROPE},
    "glm4v": {"text_config.rope_parameters": MROPE},
    "glm4v_moe": {"text_config.rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
    "glm5_next": {
        "text_config.layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "text_config.indexer_types": ["full"] * 3,
        "text_config.index_kpool": 4,
    },
    "glm_ocr": {"text_config.rope_parameters": MROPE},
    "glmga": {"text_config.rope_parameters": MROPE},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 1, 2],
        "image_grid_pinpoints": TILES,
        "vision_config.hidden_size": 64,
        "vision_config.num_attention_heads": 2,
    },
    "granite_docling": {"vision_config.scale_factor": 2},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": MROPE},
    "idefics": {"alpha_initializer": "ones"},
    "inkling2": {
        "text_config.layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "text_config.n_layers_per_attn_res_block": 2,
    },
    "inkling_mm_model": {"audio_config.n_mel_bins": 4, "audio_config.mel_vocab_size": 8},
    "instructblip": {"num_query_tokens": 9, "image_token_index": 190, "text_config": VICUNA},
    "instructblipvideo": {"num_query_tokens": 9, "video_token_index": 190, "text_config": VICUNA},
    "kimi_k25": {"projection_hidden_size": 32, "text_config.head_dim": 8},
    "kosmos-2": {"image_token_id": 190},
    "kosmos-2.5": {"image_token_id": 190},
    "lfm2_vl": {
        # By default, every layer attends; the checkpoints have short convolutions in between.
        "text_config.layer_types": ["conv", "full_attention", "conv"],
        "projector_hidden_size": HIDDEN,
    },
    "llama4": {
        "vision_config.vision_output_dim": 32,  # width of the encoder's output
        "vision_config.intermediate_size": 128,
        "text_config.no_rope_layers": [1, 1, 0],
        "text_config.layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "text_config.moe_layers": [1, 2],
        # Longer than the prompts: chunks that end within an image would split it.
        "text_config.attention_chunk_size": 64,
    },
    "llava_next": {"image_grid_pinpoints": TILES},
    "llava_next_video": {"image_grid_pinpoints": TILES},
    "llava_onevision": {"image_grid_pinpoints": TILES},
    "minicpm_ocr": MINICPM,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM
    | {
        "image_start_id": 192,
        "image_end_id": 193,
        "slice_start_id": 194,
        "slice_end_id": 195,
        "newline_id": 196,
    },
    "mistral_large4": {
        "text_config.head_dim": 8,
        "text_config.index_n_heads": 2,
        "text_config.index_head_dim": 16,
    },
    "mllama": {
        "vision_config.max_num_tiles": 4,
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.vision_output_dim": 64,
        "text_config.vocab_size": 200,
    },
    "molmo2": {
        "adapter_config.text_hidden_size": HIDDEN,
        "adapter_config.vision_feature_layer": [1, 0],
        "vision_config.num_position_embeddings": 36,
    },
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": HIDDEN},
    "muse_spark": {"out_hidden_size": 128, "projector_hidden_size": HIDDEN},
    "nemotron_h_omni": {
        "image_token_id": 190,
        "projector_hidden_size": HIDDEN,
        "vision_hidden_size": 32,
        "vision_config.patch_dim": 48,
        "vision_config.video_patch_dim": 96,
        "vision_config.max_img_size": 64,
        "text_config.mamba_num_heads": 4,
        "text_config.mamba_head_dim": 32,
        "text_config.n_groups": 2,
        "text_config.ssm_state_size": 16,
        "text_config.chunk_size": 16,
        "text_config.moe_shared_expert_intermediate_size": 32,
    },
    "paddleocr_vl": {"text_config.rope_parameters": MROPE},
    "perception_lm": {"vision_use_cls_token": False},
    "pi0": {
        "chunk_size": 6,
        "dit_config.num_hidden_layers": 3,
        "dit_config.vocab_size": 200,
        "vlm_config.vocab_size": 200,
    },
    "pix2struct": {"vision_config.hidden_size": HIDDEN},
    "qwen2_5_omni_thinker": {
        "text_config.rope_parameters": MROPE,
        "vision_start_token_id": 198,
        "vision_end_token_id": 199,
    },
    "qwen2_5_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_vl": {"vision_config.hidden_size": HIDDEN, "text_config.rope_parameters": MROPE},
    "qwen3_omni_moe_thinker": {
        "text_config.rope_parameters": MROPE | {"mrope_interleaved": True},
        "vision_start_token_id": 198,
        "vision_end_token_id": 199,
    },
    "qwen4_exp": {
        "text_config.rope_parameters": MROPE | {"mrope_interleaved": True},
        "text_config.eos_token_id": 199,
        # The defaults are none of both; the checkpoints have both.
        **{f"text_config.indexer_{name}": size for name, size in SPARSE.items()},
        "text_config.layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "text_config.ple_layer_ids": [1],
        "text_config.ple_embed_dim": 32,
        "text_config.heads_per_ngram": 2,
        "text_config.ngram_vocab_size_base": 100,
        "text_config.make_ngram_vocab_size_divisible_by": 8,
        "text_config.split_ngram_parts": 1,
    },
    "shieldgemma2": {"mm_tokens_per_image": 9},
    "step3p7": {
        "text_config.layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "text_config.sliding_window": 16,
        "text_config.num_sliding_attention_heads": 4,
        "text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "t5gemma2": {"encoder.mm_tokens_per_image": 9},
    "udop": {"decoder_start_token_id": 160},
    "unlimited_ocr": {
        "vision_config.sam_config.downsample_channels": [32, 32],
        "vision_config.sam_config.output_channels": 32,
        "vision_config.sam_config.global_attn_indexes": [1],
        "vision_config.sam_config.mlp_dim": 64,
    },
    "video_llama_3": {"vision_config.merge_size": 2},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vision-encoder-decoder": {"decoder_start_token_id": 161, "pad_token_id": 160},
}
"""Model type -> dotted name of a setting -> value."""
