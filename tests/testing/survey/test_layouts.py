"""Layouts of images: one family each encodes them."""

from __future__ import annotations

import warnings

import pytest
import torch

from vlcache_fx.testing.survey.families import CORRECTIONS, build_family, known_families
from vlcache_fx.testing.survey.layouts import LAYOUTS, UNFLATTENED
from vlcache_fx.testing.survey.prompts import image_prompt

FAMILIES = {
    "image_merge_sizes": "video_llama_3",
    "image_grid_thw": "kimi_k25",
    "image_grid_hw": "nemotron_h_omni",
    "flattened_patches": "pix2struct",
    "spatial_shapes": "lfm2_vl",
    "target_sizes": "minicpmv4_7",
    "image_token_pooling": "molmo2",
}
"""Name of an encoder's input -> a family that takes it."""


def test_every_layout_has_a_family() -> None:
    assert set(FAMILIES) == set(LAYOUTS)


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_the_encoder_sees_the_image(name: str, family: str) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # transformers warns of its own defaults
        built = build_family(family)
        prompts = [image_prompt(built, 4, 3, image=image) for image in (1, 1, 2)]
        assert name in prompts[0]
        first, same, other = (built.model(**prompt).logits for prompt in prompts)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_corrected_families_exist() -> None:
    assert set(CORRECTIONS) | UNFLATTENED <= set(known_families())
