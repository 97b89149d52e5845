"""Folders with models that all servers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vlcache_fx.testing import reference_vlm

PATCH, MERGE, TEMPORAL = 4, 2, 2
PIXELS_OF_TOKEN = PATCH * MERGE
"""Side of the square that one vision token shows."""

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 1024, 8, 16, 2, 4096
"""Of the model for times: 127 M parameters in the decoder."""


def write_models(folder: Path, longest_edge_tokens: int) -> dict[str, Path]:
    """Write both models, unless they are there; return their folders.

    Args:
        folder: created if needed.
        longest_edge_tokens: largest number of tokens of a picture; none is resized.
    """
    found = {"reference": folder / "reference", "times": folder / "times"}
    for name, target in found.items():
        if not (target / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            _write(name, target)
        _write_processor(target, longest_edge_tokens)
        (target / "complete").touch()
    return found


def _write(name: str, folder: Path) -> None:
    model: Any = reference_vlm.load_model()
    if name == "times":
        config = model.config
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.num_hidden_layers, text.intermediate_size = HIDDEN, LAYERS, INTERMEDIATE
        text.num_attention_heads, text.num_key_value_heads = HEADS, KV_HEADS
        text.layer_types = ["full_attention"] * LAYERS
        text.max_position_embeddings = 32768
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
        vision.out_hidden_size = HIDDEN
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = type(model)(config)
    model.save_pretrained(folder)
    processor: Any = reference_vlm.load_processor()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder)


def _write_processor(folder: Path, most_tokens: int) -> None:
    """Settings with which ``Qwen2_5_VLProcessor`` makes the patches of ``ReferenceProcessor``."""
    side = PIXELS_OF_TOKEN
    common = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "min_pixels": side**2,
        "max_pixels": most_tokens * side**2,
        "size": {"shortest_edge": side**2, "longest_edge": most_tokens * side**2},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    for name, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"}),
    ):
        (folder / name).write_text(json.dumps({**common, **kind}, indent=1) + "\n", encoding="utf-8")
