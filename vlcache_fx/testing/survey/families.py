"""Builds the small model of a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlcache_fx.testing.prompts import seeded
from vlcache_fx.testing.survey.configs import small_values
from vlcache_fx.testing.survey.corrections import CORRECTIONS

STAND_INS = {"fast_vlm": None, "gemma3n": None, "perception_lm": {"embed_dim": 32}}
"""Families whose encoder needs timm; another one takes its place -> ``model_args`` of its configuration."""

WRAPPERS = {"mistral4": "mistral3"}
"""Text models -> the family with images in which checkpoints use them."""


@dataclass(frozen=True)
class FamilyModel:
    """A small model of a family.

    Attributes:
        model_type: as in ``config.json``.
        model: with random weights, in eval mode.
        special: name -> id of special tokens.
    """

    model_type: str
    model: Any
    special: Mapping[str, int] = field(default_factory=dict)


def known_families() -> dict[str, str]:
    """Return all families of transformers for images and text to text: model type -> class name."""
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {model_type: name for model_type, name in names.items() if isinstance(name, str)}


def build_family(model_type: str, *, seed: int = 0, attention: str | None = None) -> FamilyModel:
    """Build a family's small model.

    Args:
        model_type: a key of ``known_families()``.
        seed: seed of the weights.
        attention: ``attn_implementation``; None for the model's default.

    Raises:
        Exception: any error of the family's code for inconsistent small sizes.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    special: dict[str, int] = {}
    wrapper = WRAPPERS.get(model_type, model_type)
    config_class = CONFIG_MAPPING[wrapper]
    values = small_values({**config_class().to_dict(), **_encoder(config_class)}, special)
    for path, value in CORRECTIONS.get(model_type, {}).items():
        _set(values, path, value)
    if model_type in STAND_INS:
        from vlcache_fx.testing.survey.stand_in import stand_in_config

        values["vision_config"] = stand_in_config(model_args=STAND_INS[model_type])
    config = config_class(**values)
    if attention is not None:
        config._attn_implementation = attention
    with seeded(seed):
        model = getattr(transformers, known_families()[wrapper])(config)
        for parameter in model.parameters():
            if not parameter.any():  # gates and queries of zeros would hide the image
                torch.nn.init.normal_(parameter, std=0.02)
    return FamilyModel(model_type, model.eval(), special)


def _encoder(config_class: Any) -> dict[str, Any]:
    """Return the encoder's default configuration, of families whose own default has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    spec = getattr(config_class, "sub_configs_defaults", {}).get("vision_config")
    if spec is None or config_class().vision_config is not None:
        return {}
    own = spec.model_type in CONFIG_MAPPING
    return {"vision_config": (CONFIG_MAPPING[spec.model_type] if own else spec.config_class)().to_dict()}


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values[name]
    values[last] = value
