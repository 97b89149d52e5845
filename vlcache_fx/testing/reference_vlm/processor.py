"""The reference model's processor: text and pictures -> model inputs.

Signature and results of ``Qwen2_5_VLProcessor``, without torchvision and without a video processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlcache_fx.testing.reference_vlm.scans import FloatArray, IntArray
from vlcache_fx.testing.reference_vlm.vocabulary import IMAGE, RESPONSE_TEMPLATE, VIDEO, build_tokenizer

if TYPE_CHECKING:
    from transformers import BatchFeature

PROCESSOR_FILE = "processor_config.json"


class ReferenceImageProcessor:
    """Splits RGB pictures into flattened patches in the order of Qwen2-VL's vision encoder; no resizing."""

    model_input_names = ("pixel_values", "image_grid_thw")

    def __init__(self, patch_size: int = 4, merge_size: int = 2, temporal_patch_size: int = 2) -> None:
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.temporal_patch_size = temporal_patch_size

    def patchify(self, pixels: np.ndarray[Any, Any]) -> tuple[FloatArray, IntArray]:
        """Map bytes ``[n, height, width, 3]`` to ``[n * patches, 3 * t * p * p]`` and grids ``[n, 3]``.

        Bytes 0..255 become -1..1. Height and width are multiples of ``patch_size * merge_size``.
        """
        count, height, width, _ = pixels.shape
        patch, merge = self.patch_size, self.merge_size
        if height % (patch * merge) or width % (patch * merge):
            raise ValueError(
                f"picture sides must be multiples of {patch * merge} pixels, not {height}x{width}"
            )
        values = pixels.astype(np.float32) / 127.5 - 1.0
        rows, columns = height // patch, width // patch
        values = values.reshape(count, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        values = values.transpose(0, 1, 4, 2, 5, 7, 3, 6)[..., None, :, :]
        values = np.repeat(values, self.temporal_patch_size, axis=-3)
        patches = values.reshape(count * rows * columns, 3 * self.temporal_patch_size * patch * patch)
        return patches, np.tile(np.array([1, rows, columns], np.int64), (count, 1))

    def __call__(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Process one picture or a list of them, of any mix of sizes."""
        from transformers import BatchFeature

        parts = [self.patchify(np.asarray(image.convert("RGB"))[None]) for image in flatten_images(images)]
        data = {
            "pixel_values": np.concatenate([patches for patches, _ in parts]),
            "image_grid_thw": np.concatenate([grid for _, grid in parts]),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)


def flatten_images(images: Any) -> list[Any]:
    """Flatten a picture, a list, or a list of lists to a list."""
    if images is None:
        return []
    if not isinstance(images, Iterable) or hasattr(images, "convert"):
        return [images]
    return [image for item in images for image in flatten_images(item)]


class ReferenceProcessor:
    """Processes texts and images, applies the chat template, and decodes tokens."""

    def __init__(self, image_processor: ReferenceImageProcessor | None = None, tokenizer: Any = None) -> None:
        self.image_processor = image_processor or ReferenceImageProcessor()
        self.tokenizer: Any = tokenizer if tokenizer is not None else build_tokenizer()
        self.image_token, self.video_token = IMAGE, VIDEO
        ids: Any = self.tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
        self.image_token_id = int(ids[0])
        self.video_token_id = int(ids[1])
        self.chat_template = self.tokenizer.chat_template
        self.tokenizer.response_template = RESPONSE_TEMPLATE

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        return_mm_token_type_ids: bool = True,
        **_: Any,
    ) -> BatchFeature:
        """Create ``input_ids``, ``attention_mask`` and ``mm_token_type_ids [batch, length]`` and the pixels.

        Each ``<|image_pad|>`` in the texts represents one picture and is expanded to its vision tokens.
        Shorter texts are padded on the left.
        """
        from transformers import BatchFeature

        if text is None:
            raise ValueError("the reference processor needs text")
        texts = [text] if isinstance(text, str) else list(text)
        data: dict[str, Any] = {}
        counts: list[int] = []
        pictures = flatten_images(images)
        if pictures:
            data.update(self.image_processor(pictures, return_tensors=None))
            counts = (data["image_grid_thw"].prod(axis=1) // self.image_processor.merge_size**2).tolist()
        encoded = self.tokenizer(widen_image_tokens(texts, counts), padding=padding, return_tensors=None)
        data["input_ids"], data["attention_mask"] = encoded["input_ids"], encoded["attention_mask"]
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = [
                [int(t == self.image_token_id) for t in row] for row in data["input_ids"]
            ]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Any,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages to text; with ``tokenize=True`` process it with the messages' (or given) images."""
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        texts = [
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self.chat_template,
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts if batched else texts[0]
        kwargs.pop("return_dict", None)
        pictures = flatten_images(images) or [
            part["image"]
            for messages in conversations
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image" and "image" in part
        ]
        return self(text=texts, images=pictures or None, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Call the tokenizer's ``decode``."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Call the tokenizer's ``batch_decode``."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode what a model generated, as ``pipeline("image-text-to-text")`` asks for it."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> ReferenceProcessor:
        """Read a local folder that ``save_pretrained`` wrote."""
        from transformers import PreTrainedTokenizerFast

        settings = json.loads((Path(folder) / PROCESSOR_FILE).read_text(encoding="utf-8"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        return cls(ReferenceImageProcessor(**settings["image_processor"]), tokenizer)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the tokenizer's files and ``processor_config.json`` into ``folder``."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(target))
        settings = {"processor_class": type(self).__name__, "image_processor": vars(self.image_processor)}
        (target / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def widen_image_tokens(texts: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Repeat the n-th ``<|image_pad|>`` of all texts ``counts[n]`` times."""
    placed = sum(text.count(IMAGE) for text in texts)
    if placed != len(counts):
        raise ValueError(f"the text names {placed} pictures but {len(counts)} were given")
    remaining = iter(counts)
    widened = []
    for text in texts:
        first, *rest = text.split(IMAGE)
        widened.append(first + "".join(IMAGE * next(remaining) + part for part in rest))
    return widened
