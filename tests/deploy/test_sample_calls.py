"""Sample inputs of both prefill programs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlcache_fx.deploy.decoder import describe_export
from vlcache_fx.deploy.sample_calls import ExampleCall, example_calls, features_of
from vlcache_fx.deploy.trace import ExportInput, capture_for_export
from vlcache_fx.errors import ExportError
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from .helpers import tiny_shapes

EXAMPLE = tiny_vlm_inputs(5, 4, [(20, 0)])


@pytest.fixture(scope="module")
def model() -> TinyVlm:
    return tiny_vlm(num_layers=2)


@pytest.fixture(scope="module")
def found(model: TinyVlm) -> ExportInput:
    return capture_for_export(model, EXAMPLE, tiny_shapes())


@pytest.fixture(scope="module")
def programs(found: ExportInput) -> tuple[Program, Program]:
    return cold_program(found.decoder), warm_program(found.decoder)


def calls(
    found: ExportInput, programs: tuple[Program, Program], groups: tuple[int, ...] = (2,)
) -> tuple[ExampleCall, ExampleCall]:
    decoder = describe_export(found, programs[0].recorded, groups)
    return example_calls(found, decoder, *programs)


@pytest.mark.parametrize("groups", [(2,), (1, 1)])
def test_example_calls_fill_all_inputs(
    found: ExportInput, programs: tuple[Program, Program], groups: tuple[int, ...]
) -> None:
    for call, program in zip(calls(found, programs, groups), programs, strict=True):
        placeholders = program.graph_module.graph.find_nodes(op="placeholder")
        assert len(call.inputs) == len(placeholders)
        for value, node in zip(call.inputs, placeholders, strict=True):
            form = node.meta["val"]
            assert (value.dtype, value.dim()) == (form.dtype, form.dim())


def test_example_calls_cold_equals_model(
    model: TinyVlm, found: ExportInput, programs: tuple[Program, Program]
) -> None:
    cold, _ = calls(found, programs)
    with torch.no_grad():
        torch.testing.assert_close(cold.results[0], model(**EXAMPLE))


def test_example_calls_warm_reuses_half_of_the_image(
    found: ExportInput, programs: tuple[Program, Program]
) -> None:
    _, warm = calls(found, programs)
    added = dict(zip(map(str, programs[1].slots), warm.inputs[len(found.inputs) :], strict=True))
    assert len(added["rows.0"]) == 9 + 10
    assert added["donor.0.k"].shape[1] == 20
    assert torch.equal(added["rows.0"], added["rows.1"])
    assert torch.isfinite(warm.results[0]).all()


def changed(found: ExportInput, image_tokens: int) -> ExportInput:
    inputs = tiny_vlm_inputs(5, 4, [(image_tokens, 0)] if image_tokens else [])
    return dataclasses.replace(found, values={**found.values, "input_ids": inputs["input_ids"]})


def test_example_calls_mismatched_placeholders(found: ExportInput, programs: tuple[Program, Program]) -> None:
    with pytest.raises(ExportError, match="placeholders and encoder features do not agree in number"):
        calls(changed(found, 19), programs)


def test_example_calls_without_image(found: ExportInput, programs: tuple[Program, Program]) -> None:
    empty = {"input_ids": EXAMPLE["input_ids"].clamp(max=100), "pixel_values": torch.zeros(0, 6)}
    with pytest.raises(ExportError, match="example_inputs contain neither an image"):
        calls(dataclasses.replace(found, values=empty), programs)


def test_features_of_split_encoder(found: ExportInput) -> None:
    assert found.split is not None
    assert len(features_of(found.split)) == 1
