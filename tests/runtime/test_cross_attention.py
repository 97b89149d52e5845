"""Decoders with cross-attention: values that depend on the item alone are reused exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.testing.prompts import noise, seeded
from vlcache_fx.testing.survey.families import FamilyModel, build_family
from vlcache_fx.testing.survey.prompts import image_prompt

from .helpers import Pair, own_compiler_state, settings_of, with_api, with_backend

WIDTH = 8


@pytest.fixture(autouse=True)
def _compiler_of_each() -> Iterator[None]:
    with own_compiler_state():
        yield


class Attending(nn.Module):
    """Tokens that attend to each other, then to the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.encoder, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        image = self.encoder(pixels).relu()
        x = self.embed(ids)
        x = x + attended(x, x, x, is_causal=True)
        return x + attended(x, self.key(image), self.value(image))


def attended(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    heads = (part[:, None] for part in (query, key, value))
    result: Tensor = F.scaled_dot_product_attention(*heads, **options)
    return result[:, 0]


def attending(**options: Any) -> Pair:
    with seeded(0):
        return with_backend(Attending().eval(), **options)


def call(ids: int, pixels: int, tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(ids)
    return {
        "ids": torch.randint(0, 20, (1, tokens), generator=generator),
        "pixels": noise(pixels, 1, 5, WIDTH),
    }


def test_known_image_with_any_text() -> None:
    pair = attending()
    for ids, pixels, tokens, mode in (
        (0, 0, 6, "cold"), (1, 0, 6, "warm"), (2, 0, 9, "warm"), (2, 1, 9, "cold"), (0, 1, 6, "warm"),
    ):  # fmt: skip
        off, report = pair.run(**call(ids, pixels, tokens))
        assert off == 0.0
        assert (report["mode"], report["encoder_hit"]) == (mode, mode == "warm")
        assert report["reason"] == (None if mode == "warm" else "the attended item is new")
    assert pair.engine.stats()["encoder"] == {"hits": 3, "misses": 2}


def test_keys_cover_weights_and_salt() -> None:
    pair = attending()
    pair.run(**call(0, 0))
    with settings_of(pair.engine, salt="another"):
        assert pair.run(**call(0, 0))[1]["mode"] == "cold"
    with torch.no_grad():
        for model in (pair.model, pair.reference):
            model.value.weight.mul_(2)
    off, report = pair.run(**call(0, 0))
    assert (off, report["mode"]) == (0.0, "cold")
    with torch.no_grad():
        for model in (pair.model, pair.reference):
            model.embed.weight.mul_(2)  # values of the image do not depend on it
    off, report = pair.run(**call(0, 0))
    assert (off, report["mode"]) == (0.0, "warm")


@pytest.mark.thorough  # the tests above have its form of layers in plain torch
def test_mllama() -> None:
    pair = with_api(build_family("mllama").model)
    family = FamilyModel("mllama", pair.reference)
    for text, image, mode in ((0, 0, "cold"), (1, 0, "warm"), (1, 1, "cold"), (2, 0, "warm")):
        off, report = pair.run(**image_prompt(family, 5 + text, 4, image=image, text=text))
        assert off == 0.0
        assert (report["mode"], report["encoder_hit"]) == (mode, mode == "warm")
    assert pair.engine.refusals == []
