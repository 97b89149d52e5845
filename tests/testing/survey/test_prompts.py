"""Small models that build and run, and their prompts."""

from __future__ import annotations

import warnings

import pytest
import torch

from vlcache_fx.testing.survey.families import build_family
from vlcache_fx.testing.survey.outcome import try_family
from vlcache_fx.testing.survey.prompts import image_prompt, image_token

LAYOUTS = {
    "blip": (0, "no placeholders: the decoder attends to the image"),
    "fuyu": (36, "patches, which one matrix projects"),
    "gemma3n": (36, "an encoder that stands in for one of timm"),
    "gemma4_unified": (36, "patches with their positions, and no default encoder"),
    "idefics": (0, "gates, and a mask of the images that a token sees"),
    "inkling2": (12, "pixels of a token each, channels last"),
    "inkling_mm_model": (9, "pixels of a token each, in time"),
    "instructblipvideo": (18, "frames, and a question to the encoder"),
}
"""Family -> tokens of an image, and what is special about its inputs."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_image_prompt_fits_the_model(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own defaults
        family = build_family(name)
    prompt, token = image_prompt(family, 3, 4, image=1), image_token(family)
    assert int((prompt["input_ids"] == token).sum()) == LAYOUTS[name][0] if token else token is None
    with torch.no_grad():
        one = family.model(**prompt).logits
        other = family.model(**image_prompt(family, 3, 4, image=2)).logits
    assert one.isfinite().all()
    assert not torch.equal(one, other)


def test_family_without_images() -> None:
    outcome = try_family("evolla")
    assert outcome.results == {}
    assert outcome.detail.startswith("takes no images: its inputs are attention_mask, input_ids")
