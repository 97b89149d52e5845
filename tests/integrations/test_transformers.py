"""The encoder cache and the hooks of transformers models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.integrations.encoder_cache import EncoderCache
from vlcache_fx.integrations.transformers import concat_encoder_outputs, restore_items
from vlcache_fx.options import Options
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

from ..runtime.helpers import Pair, hits, own_compiler_state, settings_of, with_api, with_backend

TALL, WIDE = (12, 8, 0), (8, 10, 1)
NEW = (10, 10, 2)


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


SIZES: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
"""Calls of each counter. Not an attribute, because a hook's attributes are part of the keys."""


class Counter:
    """Records the number of images (or patches) of each call of a module."""

    def __init__(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        SIZES.setdefault(self, []).append(first.shape[0])

    def taken(self) -> list[int]:
        return SIZES.pop(self, [])


def greedy(pair: Pair, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ours, theirs = (
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        for model in (pair.model, pair.reference)
    )
    return ours, theirs


# Qwen, through generate() -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(_compiler: None) -> tuple[Pair, Counter]:
    pair = with_api(tiny_qwen2_5_vl(1), policy="full")
    return pair, Counter(pair.model.model.visual)


def test_known_image_is_not_encoded_again(qwen: tuple[Pair, Counter]) -> None:
    pair, encoded = qwen
    pair.engine.clear()
    for place, (images, patches, hit) in enumerate(
        [
            ([TALL], [96], False),
            ([TALL], [], True),
            ([TALL, WIDE], [80], False),
            ([WIDE, TALL], [], True),
            ([NEW, WIDE], [100], False),
        ]
    ):
        ours, theirs = greedy(pair, qwen_inputs(4 + place, 5, images, text_seed=place))
        assert encoded.taken() == patches  # only the new image
        assert pair.report["encoder_hit"] is hit
        assert torch.equal(ours, theirs)


def test_grids_are_part_of_the_key(qwen: tuple[Pair, Counter]) -> None:
    pair, encoded = qwen
    pair.engine.clear()
    for place, grid in enumerate([(12, 8), (8, 12), (12, 8), (8, 12)]):
        ours, theirs = greedy(pair, qwen_inputs(4, 5, [(*grid, 0)]))
        assert encoded.taken() == ([96] if place < 2 else [])
        assert torch.equal(ours, theirs)


def test_changed_encoder_weights_are_detected(qwen: tuple[Pair, Counter]) -> None:
    pair, encoded = qwen
    pair.engine.clear()
    inputs = qwen_inputs(4, 5, [TALL])
    greedy(pair, inputs)
    for model in (pair.model, pair.reference):
        with torch.no_grad():
            model.model.visual.merger.mlp[0].weight.mul_(1.1)
    encoded.taken()
    ours, theirs = greedy(pair, inputs)
    assert encoded.taken() == [96]
    assert hits(pair.report) == [False]
    assert torch.equal(ours, theirs)


def test_text_without_images_skips_the_encoder(qwen: tuple[Pair, Counter]) -> None:
    pair, encoded = qwen
    ours, theirs = greedy(pair, qwen_inputs(9, 5, []))
    assert encoded.taken() == []
    assert torch.equal(ours, theirs)


# LLaVA ------------------------------------------------------------------------------------------------------


def test_llava_encodes_only_new_images() -> None:
    pair = with_api(warmed_up(), policy="full")
    encoded = Counter(pair.model.model.vision_tower)
    for place, (images, sizes, hit) in enumerate(
        [([0], [1], False), ([0], [], True), ([0, 1], [1], False), ([1, 0], [], True)]
    ):
        off, report = pair.run(**llava_inputs(4 + place, 5, images, text_seed=place))
        assert encoded.taken() == sizes
        assert report["encoder_hit"] is hit
        assert off == 0.0


def warmed_up() -> nn.Module:
    """Return a model that ran once: the library's first call takes a lock, which breaks the graph, and
    installs hooks, which change the encoder's key."""
    model = tiny_llava(1)
    with torch.no_grad():
        model(**llava_inputs(2, 2, [9]))
    return model


def test_encoder_in_decoder_graph_is_skipped_on_a_hit() -> None:
    """Plain torch.compile, with pixels in the decoder's graph."""
    pair = with_backend(warmed_up(), policy="full")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for place, hit in enumerate([False, True, True]):
            off, report = pair.run(**llava_inputs(4 + 5 * place, 5, [0], text_seed=place))
            assert report["encoder_hit"] is hit
            assert off == 0.0
        assert pair.run(**llava_inputs(4, 5, [1]))[1]["encoder_hit"] is False
    assert pair.engine.stats()["encoder"] == {"hits": 2, "misses": 2}


def test_encoder_in_its_own_graph_is_cached() -> None:
    """Plain torch.compile with Dynamo's default configuration."""
    pair = with_backend(tiny_llava(1), policy="full")
    for place, images in enumerate([[0], [0], [1], [0]]):
        off, report = pair.run(**llava_inputs(4 + place, 5, images, text_seed=place))
        assert report["mode"] == ("cold", "warm", "cold", "warm")[place]
        assert off == 0.0
    assert pair.engine.stats()["encoder"] == {"hits": 2, "misses": 2}


def test_encoder_in_decoder_graph_is_cached_across_prompts() -> None:
    pair = with_backend(warmed_up(), policy="full")
    for place in range(3):
        assert pair.run(**llava_inputs(4 + place, 5, [0], text_seed=place))[0] == 0.0
    assert pair.engine.stats()["encoder"] == {"hits": 2, "misses": 1}


def test_features_are_concatenated_and_restored() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

    pair = with_api(tiny_llava(1), policy="full")
    call = llava_inputs(4, 5, [0, 1])
    with torch.no_grad():
        features = pair.reference.model.get_image_features(call["pixel_values"]).pooler_output
        inputs = {"input_ids": call["input_ids"]}
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tuple(features))}
        ours, theirs = pair.model(**inputs), pair.reference(**inputs)
        assert torch.equal(ours.logits, theirs.logits)
        found, expected = ours.image_hidden_states, theirs.image_hidden_states
        assert type(found) is type(expected)  # a tuple from transformers 5.24 on
        assert torch.equal(torch.cat([*found]), torch.cat([*expected]))
        (joined,) = concat_encoder_outputs(inputs)["mm_encoder_outputs"]["image"].pooler_output
        assert torch.equal(joined, torch.cat(tuple(features)))
        assert len(inputs["mm_encoder_outputs"]["image"].pooler_output) == 2
    assert concat_encoder_outputs(call) is call
    result = BaseModelOutputWithPast(past_key_values=None)
    result.image_hidden_states = (joined,)  # as in models that return the list unchanged
    restore_items(result, inputs)
    given = inputs["mm_encoder_outputs"]["image"]
    assert result.image_hidden_states is given.pooler_output
    result.image_outputs = BaseModelOutputWithPooling(pooler_output=(joined,))  # transformers >= 5.24
    restore_items(result, inputs)
    assert result.image_outputs is given


# The cache itself -------------------------------------------------------------------------------------------


CALLS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
"""Calls of each encoder. Not an attribute, because attributes are part of the keys."""


NESTED: dict[str, Any] = {
    "sequences": (torch.ones(2), [torch.zeros(1)], []),
    "mapping": ([torch.ones(2)], {"a": (torch.ones(1),)}),
}
NO_TENSORS: dict[str, Any] = {"int": (3, torch.ones(1)), "none": [None], "function": {"a": print}}
OTHER_FIELDS = NESTED | NO_TENSORS


class Encoder(nn.Module):
    """Returns features per image as a tuple, like the library's models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.eval()

    @property
    def calls(self) -> list[int]:
        return CALLS.setdefault(self, [])

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **options: Any) -> Any:
        self.calls.append(pixel_values.shape[0])
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        counts = [1] * len(pixel_values) if image_grid_thw is None else image_grid_thw.prod(-1).tolist()
        features: Any = tuple(part * self.weight for part in pixel_values.split(counts))
        match options.get("form"):
            case "rows":
                features = torch.cat(features)
            case "layers":
                features = ([*features], [part + 1 for part in features])
            case "mixed":
                features = torch.cat(features).flatten()
            case "plain":
                return features
            case str(other) if other in OTHER_FIELDS:
                features = OTHER_FIELDS[other]
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=features)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def cache(encoder: Encoder) -> EncoderCache:
    return EncoderCache(encoder.forward, encoder, "image", Engine(Options(lowering="eager")))


@torch.no_grad()
def test_encoder_cache_returns_writable_features(cache: EncoderCache, encoder: Encoder) -> None:
    pixels = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = pixels * 2
    for _ in range(4):
        features = cache(pixel_values=pixels).pooler_output
        assert torch.equal(torch.cat(list(features)), expected)
        for tensor in features:
            tensor.zero_()
    assert encoder.calls == [2]


@torch.no_grad()
def test_encoder_cache_keeps_item_order(cache: EncoderCache, encoder: Encoder) -> None:
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    cache(pixel_values=pixels[1:2])
    cache(pixel_values=pixels[3:])
    features = cache(pixel_values=pixels).pooler_output
    assert torch.equal(torch.cat(list(features)), pixels * 2)
    assert encoder.calls == [1, 1, 2]


@torch.no_grad()
def test_encoder_cache_positional_and_keyword_arguments(cache: EncoderCache, encoder: Encoder) -> None:
    pixels, grids = torch.ones(8, 5), torch.tensor([[1, 2, 4]])
    cache(pixels, grids)
    cache(pixel_values=pixels, image_grid_thw=grids)
    cache(pixels, image_grid_thw=grids)
    assert encoder.calls == [8]
    cache(pixels, torch.tensor([[1, 4, 2]]))
    cache(pixels, grids, vision_feature_layer=-1)
    assert encoder.calls == [8, 8, 8]


class TwoScales(nn.Module):
    """An encoder whose second parameter is no grid."""

    def forward(self, pixel_values: Tensor, fine_pixels: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=pixel_values + fine_pixels)


@torch.no_grad()
def test_encoder_cache_second_argument_is_no_grid() -> None:
    module = TwoScales().eval()
    cache = EncoderCache(module.forward, module, "image", Engine(Options(lowering="eager")))
    coarse, fine = torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.0)
    for _ in range(2):
        assert torch.equal(cache(coarse, fine).pooler_output, coarse + fine)
    assert torch.equal(cache(coarse, 2 * fine).pooler_output, coarse + 2 * fine)


def images(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


@pytest.mark.parametrize("form", ["rows", "layers"])
@torch.no_grad()
def test_encoder_cache_of_rows_and_layers(form: str, cache: EncoderCache, encoder: Encoder) -> None:
    cache(pixel_values=images(1), form=form)
    mixed = cache(pixel_values=images(2, 1, 3), form=form)
    again = cache(pixel_values=images(3, 2), form=form)
    assert encoder.calls == [1, 2]
    assert mixed.last_hidden_state is None
    expected = encoder(images(2, 1, 3), form=form).pooler_output
    if form == "rows":
        assert torch.equal(mixed.pooler_output, expected)
        assert torch.equal(again.pooler_output, images(6, 4))
    else:
        for ours, theirs in zip(mixed.pooler_output, expected, strict=True):
            assert torch.equal(torch.cat(list(ours)), torch.cat(list(theirs)))
        assert torch.equal(torch.cat(list(again.pooler_output[1])), images(7, 5))


@torch.no_grad()
def test_encoder_cache_of_undivided_results(cache: EncoderCache, encoder: Encoder) -> None:
    for _ in range(3):
        assert torch.equal(
            cache(pixel_values=images(1, 2), form="mixed").pooler_output, images(2, 4).flatten()
        )
    assert encoder.calls == [2]
    assert torch.equal(cache(pixel_values=images(2, 1), form="mixed").pooler_output, images(4, 2).flatten())
    assert encoder.calls == [2, 2]


@pytest.mark.parametrize("form", NESTED)
@torch.no_grad()
def test_encoder_cache_restores_nested_fields(form: str, cache: EncoderCache, encoder: Encoder) -> None:
    want, expected_structure = pytree.tree_flatten(NESTED[form])
    for _ in range(2):
        got, structure = pytree.tree_flatten(cache(pixel_values=images(1), form=form).pooler_output)
        assert structure == expected_structure
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert encoder.calls == [1]


@pytest.mark.parametrize("form", NO_TENSORS)
@torch.no_grad()
def test_encoder_cache_skips_fields_of_other_types(form: str, cache: EncoderCache, encoder: Encoder) -> None:
    for _ in range(2):
        assert cache(pixel_values=images(1), form=form).pooler_output is NO_TENSORS[form]
    assert encoder.calls == [1, 1]
    assert len(cache._engine.store) == 0


@torch.no_grad()
def test_encoder_cache_skips_calls_without_key_or_fields(cache: EncoderCache, encoder: Encoder) -> None:
    for _ in range(2):
        assert isinstance(cache(pixel_values=images(1, 2), form="plain"), tuple)
        cache(pixel_values=images(1, 2), callback=print)
    assert encoder.calls == [2, 2, 2, 2]
    assert len(cache._engine.store) == 0


def test_encoder_cache_skips_gradients(cache: EncoderCache, encoder: Encoder) -> None:
    pixels = torch.ones(1, 3, 2, 2)
    for _ in range(2):
        cache(pixel_values=pixels).pooler_output[0].sum().backward()
    assert encoder.calls == [1, 1]
    assert encoder.weight.grad == 24


@torch.no_grad()
def test_encoder_cache_key_includes_salt_and_weights(cache: EncoderCache, encoder: Encoder) -> None:
    pixels = torch.ones(1, 3, 2, 2)
    cache(pixel_values=pixels)
    with settings_of(cache._engine, salt="another"):
        cache(pixel_values=pixels)
    encoder.weight.mul_(2)
    (features,) = cache(pixel_values=pixels).pooler_output
    assert torch.equal(features[0] if features.dim() > 3 else features, pixels[0] * 4)
    assert encoder.calls == [1, 1, 1]
