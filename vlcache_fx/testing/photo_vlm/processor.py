"""The photo VLM's processor: text and pictures -> model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlcache_fx.testing.photo_vlm.adapter import TILE_TOKENS
from vlcache_fx.testing.photo_vlm.pictures import TILE_PIXELS
from vlcache_fx.testing.photo_vlm.words import IMAGE

if TYPE_CHECKING:
    from transformers import BatchFeature


def normalise(pixels: np.ndarray[Any, Any]) -> Tensor:
    """Map bytes ``[n, height, width, 3]`` to ``[n, 3, height, width]`` in -1..1, for EfficientNet-Lite."""
    values = (torch.from_numpy(np.ascontiguousarray(pixels)).float() - 127.0) / 128.0
    return values.permute(0, 3, 1, 2)


class PhotoProcessor:
    """Processes texts and images, and decodes tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image_token = IMAGE
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        self.chat_template = tokenizer.chat_template

    def __call__(
        self, images: Sequence[Any] | None = None, text: str | Sequence[str] = "", **_: Any
    ) -> BatchFeature:
        """Create ``input_ids`` and ``attention_mask [batch, length]`` and ``pixel_values [images, 3, h, w]``.

        Each ``IMAGE`` in the texts represents one picture and is expanded to its vision tokens. Shorter texts
        are padded on the left.

        Raises:
            ValueError: the pictures differ in size or from the texts' number, or their sides are no multiples
                of 128 pixels.
        """
        from transformers import BatchFeature

        texts = [text] if isinstance(text, str) else list(text)
        data: dict[str, Any] = {}
        tokens, named = 0, sum(part.count(IMAGE) for part in texts)
        if named != len(images or ()):
            raise ValueError(f"the text names {named} pictures but {len(images or ())} were given")
        if images:
            sizes = sorted({image.size for image in images})
            if len(sizes) > 1 or any(side % TILE_PIXELS for side in sizes[0]):
                raise ValueError(
                    f"pictures must have one size, in multiples of {TILE_PIXELS} pixels, not {sizes}"
                )
            tokens = TILE_TOKENS * sizes[0][0] * sizes[0][1] // TILE_PIXELS**2
            data["pixel_values"] = normalise(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        expanded = [part.replace(IMAGE, IMAGE * tokens) for part in texts]
        encoded = self.tokenizer(expanded, padding=True, return_tensors="pt", add_special_tokens=False)
        data["input_ids"], data["attention_mask"] = encoded["input_ids"], encoded["attention_mask"]
        return BatchFeature(data=data)

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **_: Any,
    ) -> Any:
        """Render messages to text; with ``tokenize=True`` process it with the messages' images.

        The template is SmolLM2's, in which a picture is ``IMAGE``.
        """
        contents = [message["content"] for message in conversation]
        parts = [
            [{"type": "text", "text": content}] if isinstance(content, str) else content
            for content in contents
        ]
        images = [part["image"] for content in parts for part in content if part["type"] == "image"]
        messages = [
            message | {"content": "".join(part.get("text", IMAGE) for part in content)}
            for message, content in zip(conversation, parts, strict=True)
        ]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return self(text=text, images=images or None) if tokenize else text

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Call the tokenizer's ``decode``."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Call the tokenizer's ``batch_decode``."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))
