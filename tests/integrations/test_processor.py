"""The image processor's cache: hits, misses and eviction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import OptionError
from vlcache_fx.integrations.encoder_cache import EncoderCache
from vlcache_fx.integrations.processor import CachedImageProcessor
from vlcache_fx.keys import digest_cache as known
from vlcache_fx.keys.digest_cache import is_tracked
from vlcache_fx.options import Options
from vlcache_fx.testing.reference_vlm.processor import ReferenceImageProcessor, ReferenceProcessor


class Counting(ReferenceImageProcessor):
    calls = 0

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> Any:
        Counting.calls += 1
        if images is None or images == ["photo.png"]:
            raise ValueError("no picture")
        return super().__call__(images, return_tensors, **kwargs)


@pytest.fixture
def processor() -> CachedImageProcessor:
    Counting.calls = 0
    return CachedImageProcessor(Counting())


def picture(seed: int = 0, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def test_processor_processes_an_image_once(processor: CachedImageProcessor) -> None:
    first = processor(picture(), return_tensors="pt")
    again = processor(picture(), return_tensors="pt")
    assert Counting.calls == 1
    assert again["pixel_values"] is first["pixel_values"]
    plain = ReferenceImageProcessor()(picture())
    assert {name: value.tolist() for name, value in again.items()} == {
        n: v.tolist() for n, v in plain.items()
    }
    first["more"] = 1  # results are copies that share the tensors
    assert "more" not in processor(picture(), return_tensors="pt")


@pytest.mark.parametrize(
    "images",
    [
        picture(1), [picture(), picture(1)], [[picture()], [picture(1)]], picture().convert("L"),
        picture().resize((8, 32)), picture().quantize(4),
    ],
    ids=["another", "two", "nested", "grey", "shape", "palette"],
)  # fmt: skip
def test_processor_distinguishes_images(processor: CachedImageProcessor, images: Any) -> None:
    processor(picture())
    got = processor(images)
    assert Counting.calls == 2
    assert torch.equal(got["pixel_values"], ReferenceImageProcessor()(images)["pixel_values"])
    processor(images)
    assert Counting.calls == 2


def test_processor_key_includes_settings_and_arguments(processor: CachedImageProcessor) -> None:
    processor(picture())
    processor(picture(), do_resize=False)
    processor._image_processor.merge_size = 1
    processor(picture())
    assert Counting.calls == 3
    assert processor.merge_size == 1


def test_processor_drops_written_pixels(processor: CachedImageProcessor) -> None:
    pixels = processor(picture())["pixel_values"]
    want = pixels.clone()
    pixels[0, 0] += 1
    assert not is_tracked(pixels)
    assert torch.equal(processor(picture())["pixel_values"], want)
    assert Counting.calls == 2


@pytest.mark.parametrize("arguments", [{"images": ["photo.png"]}, {"images": None}])
def test_processor_skips_images_given_by_name(processor: CachedImageProcessor, arguments: Any) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="no picture"):
            processor(**arguments)
    assert Counting.calls == 2


def test_processor_skips_results_without_tensors(processor: CachedImageProcessor) -> None:
    for _ in range(2):
        assert isinstance(processor(picture(), return_tensors=None)["pixel_values"], np.ndarray)
    assert Counting.calls == 2


def test_processor_evicts_the_least_recently_used() -> None:
    Counting.calls = 0
    one = sum(value.nbytes for value in Counting()(picture()).values())
    processor = CachedImageProcessor(Counting(), capacity_bytes=2 * one)
    for seed in (0, 1, 0, 2, 0):
        processor(picture(seed))
    assert Counting.calls == 1 + 3
    processor(picture(1))
    assert Counting.calls == 1 + 4
    processor(picture(0, side=64))  # larger than the capacity
    processor(picture(1))
    assert Counting.calls == 1 + 5
    for capacity in (0, "1 GB"):
        with pytest.raises(OptionError, match="capacity_bytes"):
            CachedImageProcessor(Counting(), capacity_bytes=capacity)


def test_processor_within_a_whole_processor(processor: CachedImageProcessor) -> None:
    whole = ReferenceProcessor()
    whole.image_processor = processor  # type: ignore[assignment]
    with pytest.raises(ValueError, match="names 0 pictures"):
        whole(text="no place for it", images=[picture()])
    assert Counting.calls == 1


class Encoder:
    def __call__(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        per_item: Any = tuple(part.mean(-1) for part in pixel_values.split(image_grid_thw.prod(-1).tolist()))
        return BaseModelOutputWithPooling(pooler_output=per_item)


@torch.no_grad()
def test_cached_pixels_are_hashed_once(
    processor: CachedImageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    digest = known.content_digest

    def seen(parts: Any, *, threaded: bool = False) -> str:
        read.append(threaded)
        return digest(parts, threaded=threaded)

    monkeypatch.setattr(known, "content_digest", seen)
    cache = EncoderCache(Encoder(), torch.nn.Identity().eval(), "image", Engine(Options(lowering="eager")))
    inputs = processor([picture(), picture(1)])
    keys = set()
    for grids in (inputs["image_grid_thw"], inputs["image_grid_thw"], torch.tensor([[1, 2, 8], [1, 4, 4]])):
        cache(inputs["pixel_values"], grids)
        keys |= set(cache._engine.store._entries)
    assert read.count(True) == 2  # two images, only in the first call
    assert len(keys) == 3
    inputs["pixel_values"][-1] += 1
    cache(inputs["pixel_values"], inputs["image_grid_thw"])
    assert read.count(True) == 4
