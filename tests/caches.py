"""All kinds of KV caches, with a model for each, and the contents of a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from vlcache_fx.testing.families import LLAVA_IMAGE_TOKENS, tiny_clip, tiny_llava
from vlcache_fx.testing.prompts import BOS, EOS, IMAGE_TOKEN, PAD, VOCABULARY, seeded

LAYERS = 2
MAX_LENGTH = 160
WINDOW = 20
"""Window of sliding layers, shorter than an image."""


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        model: function that builds a model for the cache.
        cache: function from the model's configuration to a new cache.
        traced: True if the unmodified model must be traced as well, since the library uses other kernels when
            it is traced.
    """

    model: Callable[[], Any]
    cache: Callable[[Any], Any]
    traced: bool = False


def sliding_llava(layer_types: list[str] | None = None) -> Any:
    """Return a LLaVA with a window of ``WINDOW`` tokens in all layers, or in the sliding ones of a list."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        Qwen2Config,
    )

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "sliding_window": WINDOW,
    }
    text = (
        MistralConfig(**sizes, head_dim=16)
        if layer_types is None
        else Qwen2Config(**sizes, use_sliding_window=True, layer_types=layer_types)
    )
    config = LlavaConfig(
        vision_config=tiny_clip(),
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=LLAVA_IMAGE_TOKENS,
    )
    with seeded(0):
        return LlavaForConditionalGeneration(config).eval()


def hybrid_llava() -> Any:
    return sliding_llava(["full_attention", "sliding_attention"])


class Int8Layer(DynamicLayer):
    """A cache layer that stores keys and values as int8 with scales.

    Attributes:
        dim: dim of the maximum for scales: -1 for a scale per token and head, -2 for a scale per channel over
            all tokens.
        exact_new: True to return new tokens unquantised to the attention, False to return them dequantised.
    """

    def __init__(self, dim: int, exact_new: bool) -> None:
        super().__init__()
        self.dim, self.exact_new = dim, exact_new
        self.held: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.is_initialized = True
        new = [key_states, value_states]
        past = [(held.to(scale.dtype) * scale) for held, scale in self.held]
        full = [torch.cat(pair, -2) for pair in zip(past, new, strict=True)] if past else new
        self.held = [self._quantised(states) for states in full]
        self.keys, self.values = (held for held, _ in self.held)
        if self.exact_new:
            return full
        return [held.to(scale.dtype) * scale for held, scale in self.held]

    def _quantised(self, states: Tensor) -> tuple[Tensor, Tensor]:
        scale = states.abs().amax(self.dim, keepdim=True).clamp(min=1e-6) / 127
        return (states / scale).round().to(torch.int8), scale


def int8_cache(dim: int, exact_new: bool = True) -> Callable[[Any], Cache]:
    return lambda config: Cache(layers=[Int8Layer(dim, exact_new) for _ in range(LAYERS)])


def dynamic_cache(config: Any) -> Any:
    return DynamicCache(config=config)


def static_cache(config: Any) -> Any:
    """Return a ``StaticCache`` that is allocated inside the graph of its first call."""
    return StaticCache(config=config, max_cache_len=MAX_LENGTH)


def allocated_cache(config: Any) -> Any:
    """Return a ``StaticCache`` that is allocated before the first call."""
    cache = static_cache(config)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    return cache


def llava() -> Any:
    return tiny_llava(LAYERS)


KINDS: dict[str, Kind] = {
    "dynamic": Kind(llava, dynamic_cache),
    "sliding": Kind(sliding_llava, dynamic_cache),
    "hybrid": Kind(hybrid_llava, dynamic_cache),
    "static": Kind(llava, static_cache, traced=True),
    "static, allocated": Kind(llava, allocated_cache, traced=True),
    "static, sliding": Kind(sliding_llava, allocated_cache, traced=True),
    "static, hybrid": Kind(hybrid_llava, allocated_cache, traced=True),
    "int8 per token": Kind(llava, int8_cache(-1)),
    "int8 per channel": Kind(llava, int8_cache(-2)),
    "int8 per channel, read back": Kind(llava, int8_cache(-2, exact_new=False)),
}


def state(cache: Cache) -> dict[str, Any]:
    """Return the contents of a cache by layer and name: keys and values of all positions, scales, lengths."""
    found: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        found[f"{index}.keys"], found[f"{index}.values"] = layer.keys, layer.values
        found[f"{index}.length"] = int(layer.get_seq_length())
        for name, (_, scale) in zip(("keys", "values"), getattr(layer, "held", ()), strict=False):
            found[f"{index}.{name}.scale"] = scale
    return found
