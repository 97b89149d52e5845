"""Loads the reference model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcache_fx.testing.assets import find_assets

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor


def load_model(
    dtype: torch.dtype | None = None, attn_implementation: str = "sdpa", folder: str | Path | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Load the trained reference model, in eval mode, on the CPU (``dtype``: float32 unless given).

    Raises:
        MissingAssetsError: without ``folder``, ``vlcache_fx_models`` is not installed.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Qwen2_5_VLForConditionalGeneration = load_trained(
        Qwen2_5_VLForConditionalGeneration, folder or find_assets("reference_vlm"), dtype, attn_implementation
    )
    return model


def load_trained(
    kind: type[Any], folder: str | Path, dtype: torch.dtype | None, attn_implementation: str
) -> Any:
    """Load a model of transformers from a folder, in eval mode, on the CPU; float32 by default."""
    import torch

    model: Any = kind.from_pretrained(
        str(folder), dtype=dtype or torch.float32, attn_implementation=attn_implementation
    )
    return model.train(False)


def load_processor(folder: str | Path | None = None) -> ReferenceProcessor:
    """Load the reference model's processor; raises as ``load_model`` does."""
    from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor

    return ReferenceProcessor.from_pretrained(folder or find_assets("reference_vlm"))
