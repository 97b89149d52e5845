"""Loads the hybrid model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlcache_fx.testing.assets import find_assets
from vlcache_fx.testing.reference_vlm.model import load_trained

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor


def load_model(
    dtype: torch.dtype | None = None, attn_implementation: str = "sdpa", folder: str | Path | None = None
) -> Qwen3_5ForConditionalGeneration:
    """Load the trained hybrid model, in eval mode, on the CPU (``dtype``: float32 unless given).

    Raises:
        MissingAssetsError: without ``folder``, ``vlcache_fx_models`` is not installed.
    """
    from transformers import Qwen3_5ForConditionalGeneration

    model: Qwen3_5ForConditionalGeneration = load_trained(
        Qwen3_5ForConditionalGeneration, folder or find_assets("hybrid_vlm"), dtype, attn_implementation
    )
    return model


def load_processor(folder: str | Path | None = None) -> ReferenceProcessor:
    """Load the hybrid model's processor; raises as ``load_model`` does."""
    from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor

    return ReferenceProcessor.from_pretrained(folder or find_assets("hybrid_vlm"))
