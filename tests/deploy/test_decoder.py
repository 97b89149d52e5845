"""What the runtime knows of a decoder, by way of the manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from vlcache_fx.compiler.builders.decoder import Decoder, describe_decoder
from vlcache_fx.deploy.decoder import describe_export
from vlcache_fx.deploy.trace import ExportInput, capture_for_export
from vlcache_fx.ir.refusal import without_folders
from vlcache_fx.passes.standard import cold_program
from vlcache_fx.runtime.requests.spans import Identifier
from vlcache_fx.spec.decoder import DecoderSpec
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import tiny_shapes


@pytest.fixture(scope="module", params=[{}, {"explicit_mask": True}], ids=["causal", "mask"])
def found(request: pytest.FixtureRequest) -> ExportInput:
    model = tiny_vlm(num_layers=2, **request.param)
    return capture_for_export(model, tiny_vlm_inputs(5, 4, [(20, 0)]), tiny_shapes())


@pytest.fixture(scope="module")
def described(found: ExportInput) -> tuple[DecoderSpec, DecoderSpec]:
    """Of the graph, and as a manifest holds it."""
    recorded = cold_program(found.decoder).recorded
    before = describe_decoder(found.decoder, found.facts, recorded, (1, 1)).spec
    adapter = TypeAdapter(DecoderSpec)
    after = adapter.validate_json(adapter.dump_json(exported(found).spec), extra="forbid")
    return before, after


def exported(found: ExportInput) -> Decoder:
    return describe_export(found, cold_program(found.decoder).recorded, (1, 1))


def names(found: ExportInput) -> list[str]:
    return [name for name in found.inputs if name]


def test_describe_export_survives_the_manifest(
    found: ExportInput, described: tuple[DecoderSpec, DecoderSpec]
) -> None:
    before, after = described
    assert after == exported(found).spec
    for name in ("num_layers", "num_outputs", "tail", "rows", "layer_groups", "dtype"):
        assert getattr(after, name) == getattr(before, name)
    assert after.computation == before.computation
    assert after.layout.startswith(before.layout)  # and says which other weights there are
    assert len(after.layout) > len(before.layout)
    assert (before.model_fingerprint, len(after.model_fingerprint or "")) == (None, 64)
    assert before.weights
    assert after.weights == after.writes == ()
    assert after.positions(9).tolist() == before.positions(9).tolist() == [8]  # type: ignore[union-attr]


def test_spans_are_found_without_the_graph(
    found: ExportInput, described: tuple[DecoderSpec, DecoderSpec]
) -> None:
    kept = [index for index, name in enumerate(found.inputs) if name]

    def spans(*args: Any) -> Any:
        whole: list[Any] = [None] * len(found.inputs)
        for index, value in zip(kept, args, strict=True):
            whole[index] = value
        return exported(found).prologue().spans(*whole)

    identifier = Identifier(described[1].spans, spans)
    inputs = tiny_vlm_inputs(7, 3, [(20, 0), (9, 1)])
    assert found.split is not None
    features = torch.randn(29, 16)
    named: dict[str, Tensor] = {**inputs, "features.0": features}
    identified = identifier.media_spans([named[name] for name in names(found)])
    assert identified is not None
    samples, tokens, media = identified
    assert (samples, tokens) == (1, inputs["input_ids"].shape[1])
    assert [(run.start, run.length) for run in media] == [(7, 20), (29, 9)]
    assert torch.equal(media[1].content[0], features[20:])
    short = {**named, "features.0": features[:-1]}
    assert identifier.media_spans([short[name] for name in names(found)]) is None


def test_masks_are_looked_at_without_the_graph(
    found: ExportInput, described: tuple[DecoderSpec, DecoderSpec]
) -> None:
    before, after = (spec.masks for spec in described)
    sites = [replace(site, source_line=without_folders(site.source_line)) for site in before.sites]
    assert list(after.sites) == sites
    assert after.every_layer_has_one == before.every_layer_has_one
    of_graph = [found.inputs[index] for index in before.inputs]
    assert [names(found)[index] for index in after.inputs] == of_graph
