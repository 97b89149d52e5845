"""Layout of the caches of transformers, so that one graph serves all decoding steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def order_dimensions(cache: Any) -> None:
    """Lay keys and values out as concatenation does: ``[B, H, S, D]``, with tokens behind heads in memory.

    A prompt leaves views of ``[B, S, H, D]``, and the first step concatenates them to ``[B, H, S, D]``.
    Dynamo guards on strides, so it would trace and compile the first step and all later ones separately.

    Args:
        cache: a ``transformers.Cache``, changed in place. Anything else is left alone, as are layers without
            tensors of four dimensions.
    """
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            found = getattr(layer, name, None)
            if isinstance(found, Tensor) and found.dim() == 4 and _has_tokens_first(found):
                setattr(layer, name, found.contiguous())


def _has_tokens_first(found: Tensor) -> bool:
    _, heads, tokens, _ = found.shape
    return heads > 1 and tokens > 1 and found.stride(1) < found.stride(2)
