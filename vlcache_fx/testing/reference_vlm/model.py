"""Where the reference model's files are, and how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor

ASSETS = Path(__file__).resolve().parent / "assets"


def load_model(
    dtype: torch.dtype | None = None, attn_implementation: str = "sdpa", folder: str | Path = ASSETS
) -> Qwen2_5_VLForConditionalGeneration:
    """Load the trained reference model, in eval mode, on the CPU (``dtype``: float32 unless given)."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        str(folder), dtype=dtype or torch.float32, attn_implementation=attn_implementation
    )
    model.train(False)
    return model


def load_processor(folder: str | Path = ASSETS) -> ReferenceProcessor:
    """Load the reference model's processor."""
    from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor

    return ReferenceProcessor.from_pretrained(folder)
