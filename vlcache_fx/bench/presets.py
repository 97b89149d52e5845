"""Models of a benchmark: published shapes, scaled-down shapes, or any class and configuration."""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_fx.bench.hybrid_configs import published_qwen3_5_4b, published_qwen3_5_9b, qwen3_5_config
from vlcache_fx.errors import OptionError

Config = Mapping[str, Any]

SMALL_TOWER: Config = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2}
SMALL_WINDOWED_TOWER: Config = {**SMALL_TOWER, "fullatt_block_indexes": []}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model to build with random weights. Plain data, JSON-serialisable.

    Attributes:
        name: label in tables.
        model_class: name of a class of the transformers library.
        config: its configuration, as in ``config.json``.
        vision_tokens: default tokens per image.
        feature_tower: changes of ``vision_config`` for a small encoder that computes the features of all
            systems. Times do not depend on the features' values, and a full encoder takes minutes on large
            pictures; encoder times are measured with the full encoder. None to use the full encoder.
    """

    name: str
    model_class: str
    config: Config
    vision_tokens: tuple[int, ...] = (1024, 4096)
    feature_tower: Config | None = None

    def with_layers(self, layers: int | None) -> "ModelSpec":
        """Return a copy with another number of decoder layers; None changes nothing.

        Kinds of layers keep their pattern, which repeats in a deeper decoder.

        Raises:
            OptionError: fewer than one layer.
        """
        if layers is None:
            return self
        if layers < 1:
            raise OptionError(f"layers={layers} is not valid: it must be a positive integer")
        config = copy.deepcopy(dict(self.config))
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
        if text.get("layer_types"):
            pattern = _pattern(text["layer_types"])
            text["layer_types"] = [pattern[layer % len(pattern)] for layer in range(layers)]
        return dataclasses.replace(self, config=config)

    def with_feature_tower(self) -> "ModelSpec":
        """Return a copy with the small vision encoder, if there is one."""
        if self.feature_tower is None:
            return self
        vision = {**self.config["vision_config"], **self.feature_tower}
        return dataclasses.replace(self, config={**self.config, "vision_config": vision})


def _pattern(kinds: Sequence[str]) -> Sequence[str]:
    """Return the shortest pattern that repeats in ``kinds``, the last time possibly cut."""
    sizes = range(1, len(kinds))
    size = next((n for n in sizes if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))), len(kinds))
    return kinds[:size]


def qwen2_5_vl_config(hidden: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """Return a scaled-down Qwen2.5-VL with heads of 64 values, two K/V heads and a small vision encoder."""
    return {
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **SMALL_TOWER,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden,
        },
        "image_token_id": 2,
        "video_token_id": 3,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "tie_word_embeddings": False,
    }


def _published_qwen2_5_vl(text: Config, *, tied: bool) -> dict[str, Any]:
    shared = {
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": text["hidden_size"],
    }
    ids = {"image_token_id": 151655, "video_token_id": 151656}
    marks = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    return {
        "text_config": {**text, **shared},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **ids,
        **marks,
    }


def _published_qwen3_vl_8b() -> dict[str, Any]:
    return {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        "tie_word_embeddings": False,
    }


def _presets() -> dict[str, ModelSpec]:
    qwen2_5, qwen3 = "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"
    qwen3_5 = "Qwen3_5ForConditionalGeneration"
    shape_3b = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }
    shape_7b = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    config_3b = _published_qwen2_5_vl(shape_3b, tied=True)
    config_7b = _published_qwen2_5_vl(shape_7b, tied=False)
    # Qwen3-VL reads features at three depths of its encoder: the small encoder keeps three blocks.
    tower_8b = {**SMALL_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
    specs = (
        ModelSpec("tiny", qwen2_5, qwen2_5_vl_config(128, 2, 2, 64), (120,)),
        ModelSpec("cpu", qwen2_5, qwen2_5_vl_config(1024, 8, 16, 8192)),
        ModelSpec("cpu-28", qwen2_5, qwen2_5_vl_config(1024, 28, 16, 8192)),
        ModelSpec("tiny-hybrid", qwen3_5, qwen3_5_config(256, 4, 64, SMALL_TOWER), (120,)),
        ModelSpec("cpu-hybrid", qwen3_5, qwen3_5_config(1024, 8, 8192, SMALL_TOWER)),
        ModelSpec("qwen2.5-vl-3b", qwen2_5, config_3b, (1024, 4096, 16384), SMALL_WINDOWED_TOWER),
        ModelSpec("qwen2.5-vl-7b", qwen2_5, config_7b, (1024, 4096, 16384), SMALL_WINDOWED_TOWER),
        ModelSpec("qwen3-vl-8b", qwen3, _published_qwen3_vl_8b(), (1024, 4096, 16384), tower_8b),
        ModelSpec("qwen3.5-4b", qwen3_5, published_qwen3_5_4b(), (1024, 4096, 16384), SMALL_TOWER),
        ModelSpec("qwen3.5-9b", qwen3_5, published_qwen3_5_9b(), (1024, 4096, 16384), SMALL_TOWER),
    )
    return {spec.name: spec for spec in specs}


PRESETS: Mapping[str, ModelSpec] = _presets()


def find_preset(name: str) -> ModelSpec:
    """Return a preset.

    Raises:
        OptionError: no such preset; the message lists all.
    """
    if name not in PRESETS:
        raise OptionError(f"preset={name!r} is not valid: it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def read_spec(path: Path, model_class: str | None = None) -> ModelSpec:
    """Read a model's ``config.json``.

    Args:
        path: a JSON file.
        model_class: name of a class of transformers; by default the first of the file's ``architectures``.

    Raises:
        OptionError: the file cannot be read, or there is no class.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"config={str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise OptionError(f"config={str(path)!r} must contain a JSON object, not {type(config).__name__}")
    architectures = config.get("architectures") or [None]
    name = model_class or architectures[0]
    if not isinstance(name, str):
        raise OptionError(f"config={str(path)!r} names no architecture: pass model_class")
    return ModelSpec(path.stem, name, config, vision_tokens=(1024,))
