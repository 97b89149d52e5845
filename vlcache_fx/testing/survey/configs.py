"""Small configurations: the defaults of a family with small sizes.

Sizes are recognised by names that configurations share, which usually works for new families of later
versions of transformers. ``corrections.py`` has corrections per family.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

VOCABULARY = 200
FIRST_SPECIAL = 160
"""Ids below are text; ids above are assigned to special tokens in order."""

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 3, 4, 2, 16

TEXT: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "projection_dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "max_window_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "query_pre_attn_scalar"), HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "laurel_rank", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "altup_num_inputs"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "moe_num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"), 4),
    **dict.fromkeys(("linear_num_key_heads", "first_k_dense_replace"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("swa_head_dim", "index_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("swa_num_key_value_heads",), KV_HEADS),
    **dict.fromkeys(("index_topk",), 8),
    **dict.fromkeys(("share_expert_dim", "moe_hidden_size"), 32),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("layers", "attention_heads", "num_decoder_layers"), 2),
    **dict.fromkeys(("embed_dim",), HIDDEN),
    **dict.fromkeys(("d_ff",), 96),
    "d_kv": HEAD_DIM,
    "latent_query_num": 9,
    "qk_head_dim": HEAD_DIM,
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 1024,
    "patch_size": 4,
    "image_size": 24,
    "cross_attention_layers": [1],
}
"""Sizes of language models."""

VISION: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "width", "projector_input_dim", "projector_output_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "depth", "layers", "n_layers", "num_global_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "attention_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "vision_output_dim"), HIDDEN),
    **dict.fromkeys(("text_hidden_size", "adapter_out_dim"), HIDDEN),
    **dict.fromkeys(("num_channels", "in_channels"), 3),
    **dict.fromkeys(
        ("output_channels", "base_channels", "latent_channels", "adapter_in_dim", "mm_embed_dim"), 32
    ),
    **dict.fromkeys(("mlp_dim", "projection_hidden_dim", "projection_intermediate_size"), 64),
    **dict.fromkeys(("num_embeddings", "codebook_size"), 16),
    **dict.fromkeys(("image_size", "resolution"), 24),
    **dict.fromkeys(("adapter_input_size", "output_proj_dims"), 32),
    "mm_posemb_size": 16,
    "global_attn_indexes": [1],
    "intermediate_size": 64,
    "head_dim": HEAD_DIM,
    "patch_size": 4,
    "num_position_embeddings": 144,
    "num_patches": 36,
    **dict.fromkeys(("d_model", "num_mel_bins"), 32),
    **dict.fromkeys(("encoder_layers", "encoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("output_dim", "decoder_hidden_size", "post_conv_out_channels"), HIDDEN),
    **dict.fromkeys(("post_conv_in_channels", "post_conv_mid_channels", "pooler_output_size"), 32),
    **dict.fromkeys(("max_num_patches", "seq_len"), 64),
    "patch_embed_hidden_size": 48,
    "d_kv": HEAD_DIM,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "window_size": 16,
    "mlp_ratio": 2,
    "intermediate_layers_indices": [0],
}
"""Sizes of encoders."""

TEXT_PARTS = frozenset({"text_config", "language_config", "llm_config", "decoder"})
PARTS = frozenset({"encoder", "decoder"})
"""Parts of a configuration with other names than ``*_config``."""
PER_LAYER = "per_layer_config"

IGNORED = frozenset(
    {
        *("architectures", "id2label", "label2id", "transformers_version", "dtype", "_name_or_path"),
        "number_of_conv_states",
    }
)
"""Settings without sizes, or derived from others."""


def small_values(
    values: Mapping[str, Any], special: dict[str, int], *, vision: bool = False
) -> dict[str, Any]:
    """Return the ``values`` of a configuration (``to_dict()``) with small sizes.

    Args:
        values: values of the configuration, possibly nested.
        special: name -> id of special tokens; extended.
        vision: whether the configuration is an encoder's.
    """
    sizes = VISION if vision else TEXT
    depth = next((values[name] for name in ("num_hidden_layers", "num_layers") if name in values), None)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in IGNORED:
            continue
        if isinstance(value, dict) and (name in PARTS or name.endswith("_config")) and name != PER_LAYER:
            part = name not in TEXT_PARTS
            small[name] = small_values(value, special, vision=part)
        elif name.endswith(("_token_id", "_token_index", "_token_ids", "_patch_id")) and value is not None:
            small[name] = _special(name, value, special)
        elif isinstance(value, list | tuple) and depth not in (None, 0) and len(value) == depth:
            kinds = _like(value, sizes[name]) if name in sizes else value
            small[name] = _first_kinds(kinds, sizes["num_hidden_layers"])
        elif name in sizes and value not in (None, 0):  # 0: the family has no such part
            small[name] = _like(value, sizes[name])
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[name] = _rope(value)
        elif name == PER_LAYER and isinstance(value, dict):
            small[name] = {}
        else:
            small[name] = copy.deepcopy(value)
    if small.get("kv_lora_rank") and small.get("num_key_value_heads"):
        small["num_key_value_heads"] = sizes["num_attention_heads"]  # one latent for all heads
    return small


def _like(value: Any, small: Any) -> Any:
    """Convert ``small`` to the type of ``value``."""
    if isinstance(value, list | tuple) and not isinstance(small, list):
        return type(value)([small] * len(value))
    return float(small) if isinstance(value, float) else copy.copy(small)


def _special(name: str, value: Any, special: dict[str, int]) -> Any:
    stem = name.removesuffix("_id").removesuffix("_ids").removesuffix("_index")
    found = special.setdefault(stem, FIRST_SPECIAL + len(special))
    return [found] if isinstance(value, list) else found


def _first_kinds(values: Any, count: int) -> Any:
    """Cut per-layer settings to ``count``; keep every kind if possible."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return type(values)([*kinds, *[values[-1]] * count][:count])


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Adapt the sections of multimodal rotary embeddings to small heads."""
    made = {name: _rope(value) if isinstance(value, dict) else value for name, value in values.items()}
    if "mrope_section" in made:
        made["mrope_section"] = [2, 3, 3]
    return made
