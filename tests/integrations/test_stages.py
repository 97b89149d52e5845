"""Generation stages against the models of the transformers library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

from vlcache_fx.errors import ExportError
from vlcache_fx.integrations.stages import (
    GenerationStages,
    Stage,
    generation_stages,
    prompt_positions,
    split_pixels,
)
from vlcache_fx.integrations.transformers import EncodersFirst
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.prompts import IMAGE_TOKEN, VIDEO_TOKEN
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

LAYERS = 2
CACHES = tuple(f"present.{layer}.{what}" for layer in range(LAYERS) for what in ("key", "value"))


@dataclass(frozen=True)
class Staged:
    """A model, its example and its stages."""

    model: Any
    example: dict[str, Tensor]
    stages: GenerationStages


def staged(model: Any, example: dict[str, Tensor]) -> Staged:
    stages = generation_stages(model, example)
    assert stages is not None
    return Staged(model, example, stages)


@pytest.fixture(scope="module")
def llava() -> Staged:
    return staged(tiny_llava(LAYERS), llava_inputs(5, 4, [0, 1]))


@pytest.fixture(scope="module")
def qwen() -> Staged:
    return staged(tiny_qwen2_5_vl(LAYERS), qwen_inputs(5, 4, [(8, 8, 0), (4, 8, 1), (8, 8, 2)]))


@pytest.fixture(params=["llava", "qwen"])
def either(request: pytest.FixtureRequest) -> Staged:
    found: Staged = request.getfixturevalue(request.param)
    return found


def run(stage: Stage, **changes: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        results = stage.module(*{**stage.inputs, **changes}.values())
    return dict(zip(stage.outputs, results, strict=True))


def assert_is_result(found: dict[str, Tensor], result: Any) -> None:
    assert tuple(found) == ("logits", *CACHES)
    torch.testing.assert_close(found["logits"], result.logits)
    for index, layer in enumerate(result.past_key_values.layers):
        torch.testing.assert_close(found[f"present.{index}.key"], layer.keys)
        torch.testing.assert_close(found[f"present.{index}.value"], layer.values)


def test_prefill_stage_equals_model(either: Staged) -> None:
    with torch.no_grad():
        expected = either.model(**either.example, use_cache=True, logits_to_keep=1)
    assert_is_result(run(either.stages.prefill), expected)


def test_decode_stage_equals_model(either: Staged) -> None:
    with torch.no_grad():
        before = either.model(**either.example, use_cache=True)
        inputs = either.stages.decode.inputs
        expected = either.model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            past_key_values=before.past_key_values,
            logits_to_keep=1,
        )
    found = run(either.stages.decode)
    assert_is_result(found, expected)
    assert found["present.0.key"].shape[2] == either.example["input_ids"].shape[1] + 1


def test_decode_stage_is_stateless(llava: Staged) -> None:
    first, second = run(llava.stages.decode), run(llava.stages.decode)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_encoder_stage_equals_model(either: Staged) -> None:
    with torch.no_grad():
        whole = EncodersFirst(either.model)((), dict(either.example))[1]["mm_encoder_outputs"]["image"]
    metadata = {name: either.example[name] for name in either.stages.encoders[0].fixed}
    items = split_pixels(either.example["pixel_values"], metadata, "image_grid_thw")
    assert len(items) == len(whole.pooler_output) > 1
    for (pixels, fixed), expected in zip(items, whole.pooler_output, strict=True):
        kind = {name: tuple(value.flatten().tolist()) for name, value in fixed.items()}
        (stage,) = (encoder.stage for encoder in either.stages.encoders if encoder.fixed == kind)
        (name,) = stage.outputs
        assert name in either.stages.prefill.inputs
        torch.testing.assert_close(run(stage, pixel_values=pixels)[name], expected)


def test_encoder_stage_without_grids(llava: Staged) -> None:
    (encoder,) = llava.stages.encoders
    assert (encoder.modality, encoder.fixed) == ("image", {})
    assert encoder.stage.inputs["pixel_values"].shape[0] == 1


def test_encoder_stage_per_grid(qwen: Staged) -> None:
    grids = [encoder.fixed["image_grid_thw"] for encoder in qwen.stages.encoders]
    assert grids == [(1, 8, 8), (1, 4, 8)]
    for encoder, rows in zip(qwen.stages.encoders, (64, 32), strict=True):
        assert encoder.modality == "image"
        assert list(encoder.stage.inputs) == ["pixel_values"]
        assert encoder.stage.inputs["pixel_values"].shape[0] == rows


def test_encoder_stage_of_videos() -> None:
    example = qwen_inputs(5, 4, [(8, 8, 0)])
    example["input_ids"] = example["input_ids"].masked_fill(example["input_ids"] == IMAGE_TOKEN, VIDEO_TOKEN)
    example["mm_token_type_ids"] = example["mm_token_type_ids"] * 2
    example["pixel_values_videos"] = example.pop("pixel_values")
    example["video_grid_thw"] = example.pop("image_grid_thw")
    found = staged(tiny_qwen2_5_vl(LAYERS), example)
    (encoder,) = found.stages.encoders
    assert (encoder.modality, encoder.fixed["video_grid_thw"]) == ("video", (1, 8, 8))
    assert list(encoder.stage.inputs) == ["pixel_values_videos"]
    (name,) = encoder.stage.outputs
    assert name.startswith("video.")
    assert found.stages.prefill.dynamic[name] == {0: "video_tokens"}
    with torch.no_grad():
        expected = found.model(**example, use_cache=True, logits_to_keep=1)
    assert_is_result(run(found.stages.prefill), expected)


def test_prefill_stage_dynamic_dims(either: Staged) -> None:
    prefill, decode = either.stages.prefill, either.stages.decode
    assert prefill.dynamic["input_ids"] == {1: "tokens"}
    features = [name for name in prefill.inputs if name.startswith("image.")]
    for name in features:
        assert prefill.dynamic[name] == {prefill.inputs[name].dim() - 2: "image_tokens"}
    assert prefill.dynamic.keys() == prefill.inputs.keys()
    assert decode.dynamic["input_ids"] == decode.dynamic["position_ids"] == {}
    for name in CACHES:
        assert decode.dynamic[name.replace("present", "past")] == {2: "past_tokens"}
    assert not {"attention_mask", "mm_token_type_ids", "pixel_values"} & prefill.inputs.keys()


def test_prefill_stage_positions_input(llava: Staged, qwen: Staged) -> None:
    assert "position_ids" not in llava.stages.prefill.inputs
    assert llava.stages.decode.inputs["position_ids"].tolist() == [[llava.example["input_ids"].shape[1]]]
    positions = qwen.stages.prefill.inputs["position_ids"]
    assert qwen.stages.prefill.dynamic["position_ids"] == {positions.dim() - 1: "tokens"}
    assert torch.equal(qwen.stages.decode.inputs["position_ids"], positions[..., -1:] + 1)


def test_stage_shapes() -> None:
    class Plain(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return a, b

    class Open(nn.Module):
        def forward(self, a: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return a, *rest

    dynamic = {"a": {0: "rows"}, "b": {}, "c": {1: "columns"}}
    three = dict.fromkeys("abc", torch.ones(2, 2))
    two = dict.fromkeys("ab", torch.ones(2, 2))
    assert Stage(Plain(), two, ("x", "y"), dynamic).shapes(str.upper) == ({0: "ROWS"}, {})
    assert Stage(Open(), three, ("x",), dynamic).shapes(str) == ({0: "rows"}, ({}, {1: "columns"}))


@pytest.mark.parametrize(
    ("model", "example"),
    [(tiny_vlm(), tiny_vlm_inputs(5, 4, [(20, 0)])), (nn.Linear(2, 2), {"input": torch.ones(1, 2)})],
    ids=["tiny", "linear"],
)
def test_generation_stages_of_other_models(model: nn.Module, example: dict[str, Tensor]) -> None:
    assert generation_stages(model, example) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {k: torch.cat([v, v]) for k, v in one.items()}, r"shape \[1, tokens\], not \[2, 45\]"),
        (lambda one: {**one, "input_ids": one["input_ids"][0]}, r"shape \[1, tokens\], not \[45\]"),
        (lambda one: {"pixel_values": one["pixel_values"]}, r"shape \[1, tokens\], not None"),
        (
            lambda one: {**one, "attention_mask": (one["input_ids"] != one["input_ids"][0, 0]).long()},
            "hides tokens",
        ),
        (lambda one: llava_inputs(5, 4, []), "hold no image or video"),
    ],
    ids=["two prompts", "no batch", "no tokens", "padding", "no image"],
)
def test_generation_stages_rejects_invalid_examples(
    llava: Staged, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        generation_stages(llava.model, change(llava_inputs(5, 4, [0])))


def test_generation_stages_rejects_other_caches() -> None:
    model: Any = tiny_llava(1)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        result.past_key_values.layers[0].keys = None
        return result

    model.forward = forward
    with pytest.raises(ExportError, match="does not consist of keys and values per layer"):
        generation_stages(model, llava_inputs(5, 4, [0]))


def test_split_pixels_by_grids() -> None:
    pixels = torch.arange(24.0).reshape(12, 2)
    metadata = {"image_grid_thw": torch.tensor([[2, 2, 2], [1, 2, 2]]), "kind": torch.tensor([7, 8])}
    (first, of_first), (second, of_second) = split_pixels(pixels, metadata, "image_grid_thw")
    assert torch.equal(first, pixels[:8])
    assert torch.equal(second, pixels[8:])
    assert of_first["image_grid_thw"].tolist() == [[2, 2, 2]]
    assert [of["kind"].tolist() for of in (of_first, of_second)] == [[7], [8]]


def test_split_pixels_without_grids() -> None:
    pixels = torch.arange(6.0).reshape(3, 2)
    found = split_pixels(pixels, {}, "image_grid_thw")
    assert [part.tolist() for part, _ in found] == [[row] for row in pixels.tolist()]
    assert [metadata for _, metadata in found] == [{}, {}, {}]


def test_split_pixels_rejects_wrong_grids() -> None:
    metadata = {"image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])}
    with pytest.raises(ExportError, match="image_grid_thw asks for 8 rows of pixels, 12 are given"):
        split_pixels(torch.ones(12, 2), metadata, "image_grid_thw")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("images", [[(8, 8, 0), (4, 8, 1)], [(4, 8, 1)], []])
def test_prompt_positions_equal_model(qwen: Staged, images: list[tuple[int, int, int]], device: str) -> None:
    inputs = qwen_inputs(6, 3, images)
    found = prompt_positions(tiny_qwen2_5_vl(1).to(device), inputs)
    assert found is not None
    with torch.no_grad():
        expected = EncodersFirst(qwen.model)((), dict(inputs))[1].get("position_ids")
        if expected is None:  # text alone
            expected = torch.arange(inputs["input_ids"].shape[1]).expand_as(found)
        assert torch.equal(found, expected)
        with_positions = qwen.model(**inputs, position_ids=found).logits
        torch.testing.assert_close(with_positions, qwen.model(**inputs).logits)


def test_prompt_positions_of_a_counting_model(llava: Staged) -> None:
    assert prompt_positions(llava.model, llava.example) is None


def test_prompt_positions_with_given_positions(qwen: Staged) -> None:
    inputs = {**qwen.example, "position_ids": torch.zeros(4, 1, 1)}
    assert prompt_positions(qwen.model, inputs) is None
