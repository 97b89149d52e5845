"""Tiny models of the ``transformers`` library (imported lazily), and prompts for them.

All run in milliseconds on a CPU, in eval mode, and are reproducible by seed. A prompt has text tokens before
and after one or more images; it is a dict of the model's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.testing.prompts import (
    BOS,
    EOS,
    IMAGE_TOKEN,
    PAD,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VOCABULARY,
    make_prompt,
    noise,
    seeded,
)

QWEN_PATCH, QWEN_MERGE = 4, 2
LLAVA_IMAGE_TOKENS = 36
LLAVA_IMAGE_SIZE = 24


def tiny_qwen2_5_vl(num_layers: int = 3, seed: int = 0, attention: str = "sdpa") -> Any:
    """Create a ``Qwen2_5_VLForConditionalGeneration``: M-RoPE, grouped K/V heads, windowed vision attention.

    Args:
        num_layers: number of decoder layers.
        seed: seed of the weights.
        attention: ``attn_implementation`` of the whole model.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    options: dict[str, Any] = {"attn_implementation": attention}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": QWEN_PATCH,
            "out_hidden_size": 64,
            "spatial_merge_size": QWEN_MERGE,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **options,
    )
    with seeded(seed):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    return model.eval()


def tiny_clip() -> Any:
    """Create the configuration of the vision encoder of tiny LLaVAs."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=LLAVA_IMAGE_SIZE,
        patch_size=4,
    )


def tiny_llava(num_layers: int = 3, seed: int = 0, attention: str = "sdpa") -> Any:
    """Create a ``LlavaForConditionalGeneration``: CLIP encoder, Llama decoder, 36 tokens per image.

    Args:
        num_layers: number of decoder layers.
        seed: seed of the weights.
        attention: ``attn_implementation`` of the whole model.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    options: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attention}
    config = LlavaConfig(
        vision_config=tiny_clip(),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_seq_length=LLAVA_IMAGE_TOKENS,
        **options,
    )
    with seeded(seed):
        model: Any = LlavaForConditionalGeneration(config)
    return model.eval()


def qwen_inputs(
    before: int, after: int, images: Sequence[tuple[int, int, int]], text_seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """Create a prompt for ``tiny_qwen2_5_vl``.

    Every image is one media span between a vision start and a vision end token; an image of a
    ``grid_h`` x ``grid_w`` grid (both even) fills ``grid_h * grid_w / 4`` tokens.

    Args:
        before: text tokens before the first image (its media span starts at ``before + 1``).
        after: text tokens after the last image.
        images: ``(grid_h, grid_w, image seed)`` of each.
        text_seed: seed of the text tokens.
        between: text tokens between two images.

    Returns:
        input_ids, attention_mask, mm_token_type_ids, and with images pixel_values and image_grid_thw.
    """
    media_spans = [
        [VISION_START, *[IMAGE_TOKEN] * (height * width // QWEN_MERGE**2), VISION_END]
        for height, width, _ in images
    ]
    inputs = make_prompt(before, after, between, media_spans, text_seed)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    if images:
        row = 3 * 2 * QWEN_PATCH**2
        inputs["pixel_values"] = torch.cat(
            [noise(seed, height * width, row) for height, width, seed in images]
        )
        inputs["image_grid_thw"] = torch.tensor([[1, height, width] for height, width, _ in images])
    return inputs


def llava_inputs(
    before: int, after: int, image_seeds: Sequence[int], text_seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """Create a prompt for ``tiny_llava``; every image is a media span of 36 tokens.

    Args:
        before: text tokens before the first image (its media span starts there).
        after: text tokens after the last image.
        image_seeds: seed of each image.
        text_seed: seed of the text tokens.
        between: text tokens between two images.

    Returns:
        input_ids, attention_mask, and with images pixel_values.
    """
    inputs = make_prompt(
        before, after, between, [[IMAGE_TOKEN] * LLAVA_IMAGE_TOKENS for _ in image_seeds], text_seed
    )
    if image_seeds:
        size = LLAVA_IMAGE_SIZE
        inputs["pixel_values"] = torch.stack([noise(seed, 3, size, size) for seed in image_seeds])
    return inputs
