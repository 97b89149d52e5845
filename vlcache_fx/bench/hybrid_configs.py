"""Configurations of Qwen3.5: gated delta rules in three of four layers, attention in the fourth.

Published shapes: 9B has the defaults of ``Qwen3_5TextConfig`` and ``Qwen3_5VisionConfig`` of transformers
("a Qwen3.5-9B style configuration"), but for the encoder's output, which is as wide as the decoder. Those of
4B, and the rotary parameters of both, are those of copies of ``config.json`` in public repositories.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["published_qwen3_5_4b", "published_qwen3_5_9b", "qwen3_5_config"]


def qwen3_5_config(hidden: int, layers: int, vocabulary: int, tower: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scaled-down Qwen3.5.

    Attention has heads of 64 values, two of them for K/V. Delta rules have heads of 128 values, as published,
    and as many in proportion as 9B: keys are half as wide as the residual stream, values as wide.

    Args:
        hidden: width of the residual stream, a multiple of 256.
        layers: number of layers; every fourth has attention.
        vocabulary: number of tokens.
        tower: sizes of the vision encoder.
    """
    return {
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": hidden // 256,
            "linear_num_value_heads": hidden // 128,
            "max_position_embeddings": 32768,
            "rope_parameters": _rope((3, 3, 2)),
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        "vision_config": {**tower, "patch_size": 14, "out_hidden_size": hidden},
        "image_token_id": 2,
        "video_token_id": 3,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "tie_word_embeddings": False,
    }


def published_qwen3_5_4b() -> dict[str, Any]:
    """Return Qwen3.5-4B."""
    text = {"hidden_size": 2560, "intermediate_size": 9216}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    return _published(text, vision, tied=True)


def published_qwen3_5_9b() -> dict[str, Any]:
    """Return Qwen3.5-9B."""
    return _published({"hidden_size": 4096, "intermediate_size": 12288}, {}, tied=False)


def _published(text: Mapping[str, Any], vision: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    shared = {
        "num_hidden_layers": 32,
        "max_position_embeddings": 262144,
        "rope_parameters": _rope((11, 11, 10)),
        "tie_word_embeddings": tied,
    }
    return {
        "text_config": {**text, **shared},
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


def _rope(sections: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": list(sections),
        "mrope_interleaved": True,
    }
