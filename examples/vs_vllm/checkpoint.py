"""Writes one model with seeded random weights for all libraries."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from vlcache_fx.bench.presets import qwen2_5_vl_config

PATCH, MERGE, TEMPORAL_PATCH = 14, 2, 2
PAD, END, IMAGE, VIDEO, VISION_START, VISION_END, WORDS = range(7)
"""Special tokens of ``qwen2_5_vl_config``, and the first ordinary id."""

SPECIAL = {
    "<|pad|>": PAD,
    "<|im_end|>": END,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
}
TAG = "shape.json"
"""Written last: marks a complete checkpoint, and contains its shape."""


@dataclasses.dataclass(frozen=True)
class PeerShape:
    """A Qwen2.5-VL with heads of 64 values. The defaults make 247 M parameters.

    Attributes:
        vision_depth: layers of the vision encoder; the last attends to all patches, the others to windows.
        dtype: dtype of weights and computation, a name in ``torch``.
        seed: seed of the weights.
    """

    hidden: int = 1024
    layers: int = 8
    intermediate: int = 4096
    heads: int = 16
    kv_heads: int = 2
    vocabulary: int = 59392
    vision_depth: int = 4
    vision_hidden: int = 256
    vision_intermediate: int = 1024
    vision_heads: int = 4
    dtype: str = "bfloat16"
    seed: int = 0


TINY = PeerShape(128, 2, 256, 2, 1, 128, 2, 64, 128, 1, dtype="float32")
"""A tiny model for tests."""


def model_config(shape: PeerShape) -> Any:
    """Return the transformers configuration of ``shape``."""
    from transformers import Qwen2_5_VLConfig

    config = qwen2_5_vl_config(shape.hidden, shape.layers, shape.heads, shape.vocabulary)
    config["text_config"] |= {
        "intermediate_size": shape.intermediate,
        "num_key_value_heads": shape.kv_heads,
    }
    config["vision_config"] |= {
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads,
        "fullatt_block_indexes": [shape.vision_depth - 1],
    }
    return Qwen2_5_VLConfig(**config, architectures=["Qwen2_5_VLForConditionalGeneration"])


def write_checkpoint(shape: PeerShape, vision_tokens: int, folder: Path) -> None:
    """Write weights, configuration, tokenizer and processor settings; keep existing weights.

    Args:
        shape: the model.
        vision_tokens: tokens of the largest photo; determines cache sizes and warm-up of the libraries.
        folder: created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_processors(vision_tokens, folder)
    tag = json.dumps(dataclasses.asdict(shape), indent=1) + "\n"
    if (folder / TAG).exists() and (folder / TAG).read_text(encoding="utf-8") == tag:
        return
    from transformers import Qwen2_5_VLForConditionalGeneration

    (folder / TAG).unlink(missing_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model: Any = Qwen2_5_VLForConditionalGeneration(model_config(shape))
    model.to(getattr(torch, shape.dtype)).save_pretrained(str(folder))
    _write_tokenizer(shape.vocabulary, folder)
    (folder / TAG).write_text(tag, encoding="utf-8")


def read_model(folder: Path) -> Any:
    """Load the model in ``folder`` in its saved dtype, in eval mode.

    Raises:
        OSError: there is no checkpoint.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    shape = json.loads((folder / TAG).read_text(encoding="utf-8"))
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        str(folder), dtype=getattr(torch, shape["dtype"]), attn_implementation="sdpa", local_files_only=True
    )
    return model.eval()


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write a tokenizer of one word per id: models need it to load, although prompts are ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL | {f"w{number}": number for number in range(WORDS, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{WORDS}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>").save_pretrained(str(folder))


def _write_processors(vision_tokens: int, folder: Path) -> None:
    """Write processor settings without their classes, which need torchvision.

    Mean and deviation map bytes to -1..1, like ``ReferenceImageProcessor``: all libraries receive the same
    patches. ``vision_tokens`` is the upper bound: no photo is resized.
    """
    side = PATCH * MERGE
    common = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "min_pixels": side**2,
        "max_pixels": vision_tokens * side**2,
        "size": {"shortest_edge": side**2, "longest_edge": vision_tokens * side**2},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    files = {
        "preprocessor_config.json": common | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": common | {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    for name, settings in files.items():
        (folder / name).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
