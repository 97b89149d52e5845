"""The model's class: LLaVA of transformers with another vision encoder and projector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from vlcache_fx.testing.photo_vlm.adapter import FEATURES, TILE_TOKENS, Projector
from vlcache_fx.testing.photo_vlm.pictures import TILE_PIXELS

POOL = 2
IMAGE_TOKEN_ID = 4


class Tower(nn.Module):
    """EfficientNet-Lite2 for separate tiles of 128 pixels; four vision tokens per tile."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``[images, 3, height, width]`` to ``[images, rows, columns, TILE_TOKENS, FEATURES]``."""
        images, channels, height, width = pixels.shape
        rows, columns = height // TILE_PIXELS, width // TILE_PIXELS
        tiles = pixels.reshape(images, channels, rows, TILE_PIXELS, columns, TILE_PIXELS)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, TILE_PIXELS, TILE_PIXELS)
        # A few tiles at a time fit into the CPU's caches: four times faster than all at once.
        encode: Any = self.encoder.extract_features
        maps = torch.cat([encode(tiles[start : start + 8]) for start in range(0, len(tiles), 8)])
        tokens = F.avg_pool2d(maps, POOL).permute(0, 2, 3, 1)
        return tokens.reshape(images, rows, columns, TILE_TOKENS, FEATURES)


class PhotoModel(LlavaModel):  # type: ignore[no-untyped-call]
    """LLaVA without its head; see ``PhotoVlm.assemble``."""

    def __init__(self, config: LlavaConfig, decoder: Any, encoder: nn.Module, projector: Projector) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = Tower(encoder)
        self.multi_modal_projector = projector  # type: ignore[assignment]
        self.language_model = decoder

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Encode ``pixel_values [images, 3, height, width]`` to a list with ``[tokens, WIDTH]`` per image."""
        features = self.multi_modal_projector(self.vision_tower(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]


class PhotoVlm(LlavaForConditionalGeneration):  # type: ignore[no-untyped-call]
    """``LlavaForConditionalGeneration`` with a given decoder, encoder and projector."""

    def __init__(self, config: LlavaConfig, model: PhotoModel, head: nn.Module) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = model
        self.lm_head = head

    @classmethod
    def assemble(cls, decoder: Any, encoder: nn.Module, projector: Projector) -> PhotoVlm:
        """Combine the parts; ``decoder`` is a ``LlamaForCausalLM``."""
        attention = decoder.config._attn_implementation  # The new configuration drops it.
        config = LlavaConfig(
            # Required by LLaVA's configuration, but unused: the encoder is another.
            vision_config=CLIPVisionConfig(image_size=TILE_PIXELS, patch_size=TILE_PIXELS // POOL),
            text_config=decoder.config,
            image_token_index=IMAGE_TOKEN_ID,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
        model = cls(config, PhotoModel(config, decoder.model, encoder, projector), decoder.lm_head)
        model.config._attn_implementation = attention
        model.generation_config = decoder.generation_config
        return model
