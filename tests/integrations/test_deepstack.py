"""Deepstack features (Qwen3-VL), and encoders that run before ``forward``."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.integrations.transformers import EncodersFirst
from vlcache_fx.testing.survey.families import FamilyModel, build_family
from vlcache_fx.testing.survey.prompts import image_prompt

from ..runtime.helpers import Pair, distance, hits, own_compiler_state, with_api

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture(scope="module")
def qwen(_compiler: None) -> tuple[Pair, FamilyModel]:
    pair = with_api(build_family("qwen3_vl").model, policy="full", min_span_tokens=4)
    return pair, FamilyModel("qwen3_vl", pair.reference)  # creating prompts runs the encoder


def concatenated(*prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    by_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: torch.cat([p[name] for p in prompts], int(name in by_token)) for name in prompts[0]}


def test_moved_image_is_recomputed_exactly(qwen: tuple[Pair, FamilyModel]) -> None:
    pair, family = qwen
    pair.engine.clear()
    off, report = pair.run(**image_prompt(family, 5, 6, image=0))
    assert (report["mode"], report["encoder_hit"], off) == ("cold", False, 0.0)
    off, report = pair.run(**image_prompt(family, 11, 4, image=0, text=1))
    assert (report["mode"], report["encoder_hit"], hits(report)) == ("warm", True, [True])
    assert off <= TOLERANCE
    assert [span["start"] for span in report["spans"]] == [11]
    off, report = pair.run(**image_prompt(family, 11, 4, image=1, text=1))
    assert (report["mode"], report["encoder_hit"], off) == ("cold", False, 0.0)
    assert pair.engine.refusals == []


def test_features_of_several_items_in_every_layer(qwen: tuple[Pair, FamilyModel]) -> None:
    """The encoder returns the features per layer, for all items concatenated."""
    pair, family = qwen
    pair.engine.clear()
    first, second = (image_prompt(family, 5, 3, image=seed, text=seed) for seed in (0, 1))
    assert pair.run(**first)[0] == 0.0
    for prompts, known, found in (
        ((second, first), False, [False, True]),
        ((first, second), True, [False, False]),  # a repeated missed item is recorded
        ((second, first), True, [True, True]),
    ):
        off, report = pair.run(**concatenated(*prompts))
        assert off <= TOLERANCE
        assert report["encoder_hit"] is known
        assert hits(report) == found


def test_stored_rows_are_reused(qwen: tuple[Pair, FamilyModel]) -> None:
    """Guards against tests that pass without reuse: at another position, keys and values differ."""
    pair, family = qwen
    pair.engine.clear()
    pair.run(**image_prompt(family, 5, 6, image=0))
    moved = image_prompt(family, 11, 4, image=0, text=1)
    with pair.engine.using(policy="none"):
        got, want = pair.both(**moved)
    assert pair.report["token_layer_fraction"] == 0.0
    text = moved["input_ids"].shape[1] - 4
    assert distance(got.logits[:, :11], want.logits[:, :11]) <= TOLERANCE
    assert distance(got.logits[:, text:], want.logits[:, text:]) > 1e-4


# Encoders before forward ------------------------------------------------------------------------------------


class Preparing(nn.Module):
    """The library's interface between models and ``generate()``."""

    def forward(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        mm_encoder_outputs: Any = None,
    ) -> None:
        raise AssertionError("only its arguments are asked for")

    def _prepare_multimodal_encoder_kwargs_for_generation(self, known: dict[str, Any]) -> dict[str, Any]:
        pixels = known.pop("pixel_values")  # the library's method changes the given arguments, too
        return known | {"mm_encoder_outputs": {"image": pixels * 2}}

    def _prepare_position_ids_for_generation(self, input_ids: Tensor, known: dict[str, Any]) -> Tensor:
        return input_ids + len(known)


class Mixin:
    """A mixin of the library, with positions that count tokens."""

    def _prepare_position_ids_for_generation(self, input_ids: Tensor, known: dict[str, Any]) -> Tensor:
        raise AssertionError("the model counts by itself")


class Counting(Mixin, nn.Module):
    forward = Preparing.forward
    _prepare_multimodal_encoder_kwargs_for_generation = (
        Preparing._prepare_multimodal_encoder_kwargs_for_generation
    )


class WithoutOutputs(Preparing):
    def forward(self, input_ids: Any, pixel_values: Any) -> None:  # type: ignore[override]
        raise AssertionError("only its arguments are asked for")


IDS, PIXELS = torch.tensor([[1, 2]]), torch.ones(3)


@torch.no_grad()
def test_encoders_first_computes_features_and_positions() -> None:
    args, kwargs = EncodersFirst(Preparing())((IDS, PIXELS), {"past_key_values": None})
    assert args == ()
    assert set(kwargs) == {"input_ids", "position_ids", "mm_encoder_outputs"}
    assert torch.equal(kwargs["mm_encoder_outputs"]["image"], PIXELS * 2)
    assert torch.equal(kwargs["position_ids"], IDS + 2)


@torch.no_grad()
def test_encoders_first_keeps_given_positions() -> None:
    call = {"input_ids": IDS, "pixel_values": PIXELS, "position_ids": IDS}
    assert EncodersFirst(Preparing())((), call)[1]["position_ids"] is IDS
    kwargs = EncodersFirst(Counting())((IDS,), {"pixel_values": PIXELS})[1]
    assert set(kwargs) == {"input_ids", "mm_encoder_outputs"}


class PixelsFirst(Preparing):
    """A model whose ``forward`` requires pixels."""

    def forward(  # type: ignore[override]
        self, pixel_values: Any, input_ids: Any = None, mm_encoder_outputs: Any = None
    ) -> None:
        raise AssertionError("only its arguments are asked for")


@torch.no_grad()
def test_encoders_first_gives_required_parameters() -> None:
    kwargs = EncodersFirst(PixelsFirst())((PIXELS, IDS), {})[1]
    assert kwargs["pixel_values"] is None
    assert kwargs["input_ids"] is IDS
    assert torch.equal(kwargs["mm_encoder_outputs"]["image"], PIXELS * 2)


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_values": None},
        {"pixel_values": "a file"},
        {"mm_encoder_outputs": {"image": PIXELS}},
        {"input_ids": None},
        {"past_key_values": SimpleNamespace(get_seq_length=lambda: 3)},
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_encoders_first_skips_other_calls(change: dict[str, Any]) -> None:
    call = {"input_ids": IDS, "pixel_values": PIXELS} | change
    args, kwargs = EncodersFirst(Preparing())((), call)
    assert args == ()
    assert kwargs is call


@torch.no_grad()
def test_encoders_first_with_an_empty_cache() -> None:
    call = {"pixel_values": PIXELS, "past_key_values": SimpleNamespace(get_seq_length=lambda: 0)}
    assert "mm_encoder_outputs" in EncodersFirst(Preparing())((IDS,), call)[1]


def test_encoders_first_skips_gradients_and_other_models() -> None:
    given = ((IDS,), {"pixel_values": PIXELS})
    assert EncodersFirst(Preparing())(*given) == given
    with torch.no_grad():
        assert EncodersFirst(WithoutOutputs())(*given) == given
