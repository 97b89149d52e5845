"""A Qwen2.5-VL-shaped decoder with random weights, and a photo to ask it about."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlcache_fx.testing.reference_vlm.processor import ReferenceImageProcessor

PATCH, MERGE = 14, 2
PAD, END, IMAGE, VIDEO, VISION_START, VISION_END, WORDS = range(7)
"""The special tokens, and the first id of an ordinary one."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The decoder, the request and how both are run.

    Attributes:
        grid: rows and columns of vision tokens.
        short, long: tokens of text before and after the photo in the first request, and the other way round
            in the second. So the photo moves, and both requests are equally long.
        rounds: rounds of measurement; ``eager_rounds`` of them with the unmodified model.
        lowering: of the compiled model; the plain ``torch.compile`` gets the backend of that name.
    """

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    vocabulary: int = 8192
    grid: tuple[int, int] = (46, 58)
    short: int = 20
    long: int = 40
    budget: float = 0.02
    rounds: int = 5
    eager_rounds: int = 2
    lowering: str = "inductor"


TINY = Shape(128, 2, 2, 64, grid=(10, 12), rounds=2, eager_rounds=1, lowering="eager")
"""Runs in seconds; its times mean nothing."""


def build_model(shape: Shape, dtype: torch.dtype) -> Any:
    """A Qwen2.5-VL of ``shape`` with random weights, the same ones in every call."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": 4 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 8 * PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": shape.hidden,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        return model.to(dtype).eval()


def photo_patches(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A photo resized to ``grid`` vision tokens: patches ``[patches, values]`` and their grid ``[1, 3]``."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rows, columns = grid
    photo = Image.fromarray(load_sample_image("china.jpg"))
    photo = photo.resize((columns * PATCH * MERGE, rows * PATCH * MERGE))
    patches, grids = ReferenceImageProcessor(PATCH, MERGE).patchify(np.asarray(photo)[None])
    return torch.from_numpy(patches), torch.from_numpy(grids)
