"""Encoder graphs of a request's items."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.deploy.items import EncoderCall, encoder_inputs
from vlcache_fx.deploy.specs import GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError

from .helpers import bare_manifest, encoder

PIXELS = torch.arange(24.0).reshape(12, 2)
ALL_IN_ONE = GraphSpec(
    "encoder.onnx", {"pixels": TensorSpec("float", (2,)), "scale": TensorSpec("float", (1,))}, {}
)

SMALL = encoder("small", "image", image_grid_thw=(1, 2, 2))
LARGE = encoder("large", "image", image_grid_thw=(2, 2, 2))


def calls(*encoders: Any, **inputs: Any) -> list[EncoderCall]:
    manifest = bare_manifest(encoders=encoders, graphs={"encoder": ALL_IN_ONE})
    return list(encoder_inputs(manifest, inputs))


def grids(*sizes: tuple[int, int, int]) -> Tensor:
    return torch.tensor(sizes)


def test_encoder_inputs_by_grid() -> None:
    found = calls(
        SMALL, LARGE, pixel_values=PIXELS, image_grid_thw=grids((2, 2, 2), (1, 2, 2)), input_ids=PIXELS
    )
    assert [call.spec.graph for call in found] == ["large", "small"]
    assert torch.equal(found[0].values[0], PIXELS[:8])
    assert torch.equal(found[1].values[0], PIXELS[8:])


def test_encoder_inputs_without_grids() -> None:
    found = calls(encoder("encoder", "image"), pixel_values=PIXELS[:3])
    assert [call.values[0].tolist() for call in found] == [[row] for row in PIXELS[:3].tolist()]


def test_encoder_inputs_images_and_videos() -> None:
    found = calls(
        encoder("eye", "image", image_grid_thw=(1, 2, 2)),
        encoder("film", "video", video_grid_thw=(2, 2, 2)),
        pixel_values_videos=PIXELS[:8],
        video_grid_thw=grids((2, 2, 2)),
        pixel_values=PIXELS[8:],
        image_grid_thw=grids((1, 2, 2)),
    )
    assert [call.spec.graph for call in found] == ["eye", "film"]


def test_encoder_inputs_without_modality() -> None:
    everything = encoder("encoder", "")
    (call,) = calls(everything, scale=PIXELS[0], pixels=PIXELS, other=1)
    assert torch.equal(call.values[0], PIXELS)
    assert torch.equal(call.values[1], PIXELS[0])
    assert calls(everything, pixels=PIXELS) == []


@pytest.mark.parametrize("name", ["image", ""])
def test_encoder_inputs_given_features(name: str) -> None:
    given = {f"{name or 'all'}.features": PIXELS, "pixel_values": PIXELS, "pixels": PIXELS, "scale": PIXELS}
    assert calls(encoder("encoder", name), **given) == []


def test_encoder_inputs_text_only() -> None:
    assert calls(encoder("encoder", "image"), input_ids=PIXELS, pixel_values=None) == []
    assert calls(input_ids=PIXELS) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": PIXELS}, "'image_grid_thw' is missing"),
        (
            {"pixel_values": PIXELS, "image_grid_thw": grids((1, 2, 2), (1, 2, 2))},
            "image_grid_thw asks for 8 rows of pixels, 12 are given",
        ),
        (
            {"pixel_values": PIXELS, "image_grid_thw": grids((1, 3, 4))},
            "for image items with image_grid_thw 1x3x4, .*1x2x2.*2x2x2.*image.features",
        ),
        ({"pixel_values_videos": PIXELS}, "'pixel_values_videos': this export has no video encoder"),
    ],
)
def test_encoder_inputs_unsupported_pixels(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        calls(SMALL, LARGE, **inputs)


def test_encoder_inputs_export_without_encoders() -> None:
    with pytest.raises(ExportError, match="'pixel_values': this export has no image encoder"):
        calls(pixel_values=PIXELS)
