"""Which encoder graph each item of a request goes through."""

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


def test_each_item_goes_to_the_encoder_of_its_grid() -> None:
    found = calls(
        SMALL, LARGE, pixel_values=PIXELS, image_grid_thw=grids((2, 2, 2), (1, 2, 2)), input_ids=PIXELS
    )
    assert [call.spec.graph for call in found] == ["large", "small"]
    assert torch.equal(found[0].values[0], PIXELS[:8])
    assert torch.equal(found[1].values[0], PIXELS[8:])


def test_where_there_are_no_grids_each_row_is_an_item() -> None:
    found = calls(encoder("encoder", "image"), pixel_values=PIXELS[:3])
    assert [call.values[0].tolist() for call in found] == [[row] for row in PIXELS[:3].tolist()]


def test_images_and_videos_have_encoders_of_their_own() -> None:
    found = calls(
        encoder("eye", "image", image_grid_thw=(1, 2, 2)),
        encoder("film", "video", video_grid_thw=(2, 2, 2)),
        pixel_values_videos=PIXELS[:8],
        video_grid_thw=grids((2, 2, 2)),
        pixel_values=PIXELS[8:],
        image_grid_thw=grids((1, 2, 2)),
    )
    assert [call.spec.graph for call in found] == ["eye", "film"]


def test_an_encoder_of_no_modality_takes_the_requests_inputs_as_they_are() -> None:
    everything = encoder("encoder", "")
    (call,) = calls(everything, scale=PIXELS[0], pixels=PIXELS, other=1)
    assert torch.equal(call.values[0], PIXELS)
    assert torch.equal(call.values[1], PIXELS[0])
    assert calls(everything, pixels=PIXELS) == []


@pytest.mark.parametrize("name", ["image", ""])
def test_no_encoder_runs_where_features_are_given(name: str) -> None:
    given = {f"{name or 'all'}.features": PIXELS, "pixel_values": PIXELS, "pixels": PIXELS, "scale": PIXELS}
    assert calls(encoder("encoder", name), **given) == []


def test_text_alone_needs_no_encoder() -> None:
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
            "no encoder was exported for the image image_grid_thw 1x3x4; .*1x2x2.*2x2x2.*image.features",
        ),
        ({"pixel_values_videos": PIXELS}, "pixel_values_videos are given, .* no encoder for a video"),
    ],
)
def test_pixels_without_an_encoder_are_refused(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        calls(SMALL, LARGE, **inputs)


def test_pixels_for_an_export_without_encoders_are_refused() -> None:
    with pytest.raises(ExportError, match="pixel_values are given, but this export holds no encoder"):
        calls(pixel_values=PIXELS)
