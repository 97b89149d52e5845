"""Traced models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from vlcache_fx.deploy.trace import ExportInput, capture_for_export, trace, unrolled
from vlcache_fx.errors import ExportError, Reason, UnsupportedGraphError
from vlcache_fx.integrations.stages import Stage
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import PATCH_WIDTH, TinyVlm, tiny_vlm, tiny_vlm_inputs

from .helpers import tiny_shapes

EXAMPLE = tiny_vlm_inputs(5, 4, [(20, 0)])


@pytest.fixture(scope="module")
def model() -> TinyVlm:
    return tiny_vlm(num_layers=1)


@pytest.fixture(scope="module")
def found(model: TinyVlm) -> ExportInput:
    return capture_for_export(model, EXAMPLE, tiny_shapes())


def test_capture_names_of_inputs(found: ExportInput) -> None:
    assert [name for name in found.inputs if name] == ["input_ids", "pixel_values", "features.0"]
    assert found.values.keys() == {"input_ids", "pixel_values"}
    assert torch.equal(found.values["pixel_values"], EXAMPLE["pixel_values"])
    assert found.results == ("result.0",)
    assert found.stages is None


def test_capture_names_of_weights(model: TinyVlm, found: ExportInput) -> None:
    state = model.state_dict()
    for index, (name, tensor) in found.weights.items():
        assert found.inputs[index] is None
        assert torch.equal(tensor, state[name])
    assert {name for name, _ in found.weights.values()} == state.keys()
    unnamed = [index for index, name in enumerate(found.inputs) if name is None]
    assert sorted(found.weights) == unnamed


def test_capture_splits_the_encoder_off(model: TinyVlm, found: ExportInput) -> None:
    assert found.split is not None
    args = [
        found.weights[index][1] if name is None else found.values[name]
        for index, name in enumerate(found.inputs)
        if name != "features.0"
    ]
    with torch.no_grad():
        (features,) = found.split.encoder(*args)
        torch.testing.assert_close(features, model.encoder(EXAMPLE["pixel_values"]))
    assert found.facts.num_layers == 1


def test_capture_names_of_dynamic_sizes(found: ExportInput) -> None:
    assert found.dynamic["input_ids"] == {1: "tokens"}
    assert found.dynamic["pixel_values"] == {0: "pixel_values_0"}
    assert list(found.dynamic["features.0"]) == [0]


@pytest.mark.parametrize("kind", ["keywords", "positional"])
def test_capture_default_dynamic_sizes(model: TinyVlm, kind: str) -> None:
    example: Any = EXAMPLE if kind == "keywords" else tuple(EXAMPLE.values())
    names = list(EXAMPLE) if kind == "keywords" else ["argument.0", "argument.1"]
    found = capture_for_export(model, example, None)
    assert [name for name in found.inputs if name] == [*names, "features.0"]
    assert found.dynamic[names[0]] == {1: "tokens"}
    assert list(found.dynamic[names[1]]) == [0]  # the width of patches is static
    assert found.values[names[1]].shape == (20, PATCH_WIDTH)


def test_capture_names_of_nested_arguments() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vlm = tiny_vlm(num_layers=1)

        def forward(self, text: dict[str, Tensor], images: list[Tensor]) -> Tensor:
            logits: Tensor = self.vlm(text["ids"], images[0])
            return logits

    shapes = {"text": {"ids": {1: Dim("tokens", min=4)}}, "images": [{0: Dim("patches", min=2)}]}
    example = {"text": {"ids": EXAMPLE["input_ids"]}, "images": [EXAMPLE["pixel_values"]]}
    found = capture_for_export(Nested(), example, shapes)
    assert [name for name in found.inputs if name] == ["text.ids", "images.0", "features.0"]


class Scaled(nn.Module):
    """An argument is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm(num_layers=1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        logits: Tensor = self.vlm(input_ids, pixel_values) * scale
        return logits


@pytest.mark.parametrize("kinds", ["da", "ca"])
def test_capture_refuses_recurrent_layers(kinds: str) -> None:
    """Sessions have no states yet."""
    with pytest.raises(UnsupportedGraphError, match="exports have no states of recurrent layers") as refusal:
        capture_for_export(tiny_hybrid(kinds), EXAMPLE, tiny_shapes())
    assert refusal.value.reason is Reason.TOKEN_MIXING
    assert "causal_conv1d" in refusal.value.detail


def test_capture_rejects_numbers_as_inputs() -> None:
    shapes = {**tiny_shapes(), "scale": Dim.DYNAMIC}
    with pytest.raises(ExportError, match="example_inputs must be tensors"):
        capture_for_export(Scaled(), {**EXAMPLE, "scale": 3}, shapes)


def test_capture_constant_numbers() -> None:
    found = capture_for_export(Scaled(), {**EXAMPLE, "scale": 2.0}, {**tiny_shapes(), "scale": None})
    assert [name for name in found.inputs if name] == ["input_ids", "pixel_values", "features.0"]


class Writing(nn.Module):
    """Mutates a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm(num_layers=1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.vlm(input_ids, pixel_values)
        self.seen.add_(1)
        return logits


def test_capture_rejects_input_mutations() -> None:
    with pytest.raises(UnsupportedGraphError) as refusal:
        capture_for_export(Writing().eval(), EXAMPLE, tiny_shapes())
    assert refusal.value.reason is Reason.MUTATED_INPUTS


class Grid(nn.Module):
    """Loops over the values of a constant, like encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = torch.tensor([2, 4])

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        parts = torch.split(pixels, self.sizes.tolist())
        return (torch.cat([part.flip(0) for part in parts]),)


class Outside(nn.Module):
    """Computes with numpy."""

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (torch.from_numpy(pixels.numpy() * 2),)


class Deciding(nn.Module):
    """Control flow depends on a value."""

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        return (pixels if bool(pixels.any()) else pixels + 1,)


def stage(module: nn.Module) -> Stage:
    return Stage(module, {"pixels": torch.arange(12.0).reshape(6, 2)}, ("features",), {"pixels": {}})


def test_unrolled_loop_over_constants() -> None:
    traced = unrolled(stage(Grid()))
    pixels = torch.randn(6, 2)
    assert torch.equal(traced(pixels)[0], Grid()(pixels)[0])


@pytest.mark.parametrize("module", [Deciding(), Outside()])
def test_unrolled_data_dependent_module(module: nn.Module) -> None:
    with pytest.raises(ExportError, match=f"torch cannot trace this {type(module).__name__}: "):
        unrolled(stage(module))


def test_trace_dynamic_sizes() -> None:
    class Double(nn.Module):
        def forward(self, pixels: Tensor) -> tuple[Tensor]:
            return (pixels * 2,)

    module = Double()
    open_stage = Stage(module, {"pixels": torch.ones(6, 2)}, ("x",), {"pixels": {0: "rows"}})
    program = trace(open_stage).module()
    assert program(torch.ones(9, 2))[0].shape == (9, 2)
    with pytest.raises(ExportError, match="torch cannot trace this Deciding: "):
        trace(stage(Deciding()))
