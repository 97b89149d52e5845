"""Prompts with one image for any family: random text, and random pixels in the layout of its encoder."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.testing.prompts import noise
from vlcache_fx.testing.survey.configs import FIRST_SPECIAL
from vlcache_fx.testing.survey.families import FamilyModel
from vlcache_fx.testing.survey.layouts import LAYOUTS, ImageSizes

CHANNELS_LAST = frozenset({"inkling2"})
"""Families whose encoders take the pixels of each token, channels last, and count grids in tokens."""

TILED = frozenset({"perception_lm"})
"""Families whose images are batches of tiles."""

PREFIX_LM = frozenset({"paligemma"})
"""Families whose token types mark the prompt (0) instead of images (1)."""

STARTS = ("vision_start_token_id", "image_start_id")
ENDS = ("vision_end_token_id", "image_end_id")
"""Settings that name the tokens around an image."""


class NoImagesError(Exception):
    """A model takes no images."""


def image_prompt(
    family: FamilyModel, before: int, after: int, *, image: int, text: int = 0
) -> dict[str, Any]:
    """Create keyword arguments of the model: text, one image, text.

    Args:
        family: the model.
        before: text tokens before the image.
        after: text tokens after the image.
        image: seed of the pixels.
        text: seed of the text.

    Raises:
        NoImagesError: ``forward`` has no parameter for images.
    """
    parameters = _parameters(type(family.model).forward)
    if not any(word in name for name in parameters for word in ("pixel", "image", "patch", "mm_encoder")):
        raise NoImagesError(
            f"takes no images: its inputs are {', '.join(sorted(parameters - {'self', 'kwargs'}))}"
        )
    pixels = image_pixels(family, image)
    token = image_token(family)
    filled = [] if token is None else [token] * image_tokens(family, pixels)
    generator = torch.Generator().manual_seed(text)

    def words(count: int) -> list[int]:
        return torch.randint(3, FIRST_SPECIAL, (count,), generator=generator).tolist()

    if _encodes_images_alone(family.model):
        return {"decoder_input_ids": torch.tensor([words(before + after)]), **pixels}
    start, end = (_ids(family.model.config, names) for names in (STARTS, ENDS))
    left, right = words(before), words(after)
    left[len(left) - len(start) :], right[: len(end)] = start, end
    ids = torch.tensor([[*left, *filled, *right]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if hasattr(family.model.config, "canvas_length"):  # the tokens that a diffusion model refines
        prompt["decoder_input_ids"] = torch.arange(3, 3 + family.model.config.canvas_length)[None]
    if "image_attention_mask" in parameters:  # which images a token sees
        prompt["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    if "image_embeds_position_mask" in parameters:
        prompt["image_embeds_position_mask"] = _at(ids, token).long()
    if "bbox" in parameters:  # where each word stands on the page
        prompt["bbox"] = torch.zeros(*ids.shape, 4)
    if "state" in parameters:  # of a robot, whose actions a diffusion model refines
        prompt |= _robot(family.model.config) | {"pixel_values": pixels["pixel_values"][:, None]}
    kinds = {"mm_token_type_ids", "token_type_ids"} & parameters
    prefix = family.model_type in PREFIX_LM
    return prompt | {name: torch.zeros_like(ids) if prefix else _at(ids, token).int() for name in kinds}


def _at(ids: Tensor, token: int | None) -> Tensor:
    """Return where ``ids`` is the placeholder."""
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids.eq(token)


def image_token(family: FamilyModel) -> int | None:
    """Return the placeholder id of an image's features; None if prompts hold no placeholders."""
    config = getattr(family.model.config, "vlm_config", None) or family.model.config
    for name in (
        "image_token_id",
        "image_token_index",
        "image_patch_id",
        "media_placeholder_token_id",
        "video_token_id",
        "video_token_index",
    ):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def image_tokens(family: FamilyModel, pixels: dict[str, Tensor]) -> int:
    """Return the number of rows that the encoder computes from these pixels."""
    encode = encoder_of(family)
    queries = getattr(family.model.config, "latent_query_num", None)
    if isinstance(queries, int):
        return queries
    if encode is None:
        return 1  # cross-attention: the image fills no tokens
    taken = _parameters(encode)
    with torch.no_grad():
        output = encode(**{name: value for name, value in pixels.items() if name in taken}, return_dict=True)
    features = getattr(output, "pooler_output", output)
    if features is None and hasattr(output, "deepstack_features"):
        features = output.deepstack_features[0][-1]
    features = output.last_hidden_state if features is None else features
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def image_pixels(family: FamilyModel, seed: int) -> dict[str, Tensor]:
    """Create one image in the layout of the family's processor."""
    model = family.model
    encode = encoder_of(family) or model.forward
    taken, vision = _parameters(encode), vision_config(family)
    patch, size = (
        _number(vision, "patch_size", 4),
        _number(vision, "image_size", 0) or _number(vision, "resolution", 24),
    )
    channels = _number(vision, "num_channels", 0) or _number(vision, "in_channels", 3)
    if family.model_type in CHANNELS_LAST:
        side = patch * _number(vision, "spatial_merge_size", 1)
        return {
            "pixel_values": noise(seed, 12, side, side, channels),
            "image_grid_thw": torch.tensor([[1, 3, 4]]),
        }
    frames = _number(vision, "temporal_patch_size", 0) or _number(vision, "patch_temporal", 1)
    sizes = ImageSizes(
        family.model_type, patch, size, channels, frames, _number(model.config, "merge_size", 2)
    )
    for name, layout in LAYOUTS.items():
        if name in taken:
            return layout(sizes, seed)
    if family.model_type in TILED:
        return {"pixel_values": noise(seed, 1, 1, channels, size, size)}
    if "image_position_ids" in taken:
        positions = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(-1)
        return {
            "pixel_values": noise(seed, 1, 36, channels * patch**2),
            "image_position_ids": positions[None],
        }
    if "aspect_ratio_ids" in taken:
        return {
            "pixel_values": noise(seed, 1, 1, 4, channels, size, size),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        }
    if "tile_fine_mask" in taken:
        return {
            "pixel_values": noise(seed, 1, 1, channels, size, size),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        }
    if "qformer_input_ids" in taken:  # the encoder sees the question
        batch = (1, 2) if "get_video" in encode.__name__ else (1,)
        return {
            "pixel_values": noise(seed, *batch, channels, size, size),
            "qformer_input_ids": torch.arange(3, 9)[None],
        }
    if "image_attention_mask" in taken:
        return {"pixel_values": noise(seed, 1, 1, channels, size, size)}
    if vision is model.config and taken == {"pixel_values", "kwargs"}:  # patches are projected
        return {"pixel_values": noise(seed, 1, 36, channels * patch**2)}
    if taken == {"pixel_values", "kwargs"} and hasattr(vision, "temporal_patch_size"):
        frames = vision.temporal_patch_size
        return {"pixel_values": noise(seed, 9, frames, patch, patch, channels)}
    if "high_res_pixel_values" in taken:
        fine = _number(model.config.high_res_vision_config, "image_size", 24)
        return {
            "pixel_values": noise(seed, 1, channels, size, size),
            "high_res_pixel_values": noise(seed, 1, channels, fine, fine),
        }
    if "pixel_attention_mask" in taken:
        mask = torch.ones(1, 1, size, size, dtype=torch.bool)
        return {"pixel_values": noise(seed, 1, 1, channels, size, size), "pixel_attention_mask": mask}
    if getattr(model.config, "image_grid_pinpoints", None):
        return {
            "pixel_values": noise(seed, 1, 3, channels, size, size),
            "image_sizes": torch.tensor([[size, 2 * size]]),
        }
    if "image_sizes" in taken and "vision_feature_select_strategy" not in taken:
        return {
            "pixel_values": noise(seed, 1, channels, size, size),
            "image_sizes": torch.tensor([[size, size]]),
        }
    return {"pixel_values": noise(seed, 1, channels, size, size)}


def _ids(config: Any, names: tuple[str, ...]) -> list[int]:
    """Return the first id that the configuration has for one of the names, if any."""
    return [value for name in names if isinstance(value := getattr(config, name, None), int)][:1]


def encoder_of(family: FamilyModel) -> Any:
    """Return the function that computes the features of an image or a video; None if there is none."""
    base = family.model.base_model
    parts = (base, getattr(base, "encoder", None), getattr(base, "vlm", None))
    names = ("get_image_features", "get_video_features")
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((function for function in found if function is not None), None)


def vision_config(family: FamilyModel) -> Any:
    """Return the encoder's part of the configuration; the whole one if it has no such part."""
    config = family.model.config
    outer = getattr(config, "vlm_config", None) or getattr(config, "encoder", None) or config
    parts = (getattr(outer, name, None) for name in ("vision_config", "vq_config"))
    return next((part for part in parts if part is not None), outer)


def _robot(config: Any) -> dict[str, Tensor]:
    """Return the state of a robot with one camera, and the noise of its next actions."""
    return {
        "state": noise(7, 1, config.max_state_dim),
        "noise": noise(8, 1, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.5]),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def _encodes_images_alone(model: Any) -> bool:
    """Whether the model has an encoder that sees no text, and a decoder that attends to it."""
    if not model.config.is_encoder_decoder:
        return False
    return "input_ids" not in _parameters(model.get_encoder().forward)


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, default)
    value = value[0] if isinstance(value, list | tuple) else value
    return value if isinstance(value, int) else default
