"""What the runtime knows of a decoder, by way of the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vlcache_fx.deploy.facts import (
    PROBED_LENGTHS,
    decoder_form,
    decoder_spec,
    layer_groups,
    mask_check,
)
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.trace import ExportInput, capture_for_export
from vlcache_fx.errors import PolicyError
from vlcache_fx.ir.refusal import without_folders
from vlcache_fx.passes.standard import cold_program
from vlcache_fx.policies import Policy, Profile, SpanContext, get_policy
from vlcache_fx.runtime.form import DecoderForm
from vlcache_fx.runtime.requests.masks import MaskCheck
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import bare_manifest, tiny_shapes

LAYERS = 6


def profile(*sensitivities: float) -> Profile:
    return Profile("a model", "float32", sensitivities)


@dataclass(frozen=True)
class Chosen(Policy):
    """Chooses what a test says, of a span's length."""

    name: ClassVar[str] = "chosen"

    choice: Callable[[int], Sequence[Tensor]]

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return self.choice(span.length)


@pytest.mark.parametrize("name", ["layer_aware", "uniform", "first_k", "full", "none", "random"])
def test_without_a_profile_all_layers_are_one_group(name: str) -> None:
    assert layer_groups(get_policy(name), LAYERS, None, 0.02) == (LAYERS,)


def test_a_profile_in_which_late_layers_do_not_matter_makes_groups() -> None:
    groups = layer_groups(get_policy("layer_aware"), LAYERS, profile(8, 4, 2, 1, 0, 0), 0.1)
    assert len(groups) > 1
    assert sum(groups) == LAYERS
    assert min(groups) >= 1
    assert groups[-1] >= 2


def test_a_profile_of_equal_layers_makes_one_group() -> None:
    assert layer_groups(get_policy("layer_aware"), LAYERS, profile(*[2.0] * LAYERS), 0.1) == (LAYERS,)


def test_each_layer_of_cacheblend_is_a_group() -> None:
    assert layer_groups(get_policy("cacheblend"), LAYERS, None, 0.02) == (1,) * LAYERS


def test_layers_are_one_group_only_where_they_have_the_same_rows_at_every_length() -> None:
    def choice(length: int) -> list[Tensor]:
        few, many = torch.arange(1), torch.arange(length)
        return [many, many if length == PROBED_LENGTHS[-1] else few, few.clone()]

    assert layer_groups(Chosen(choice), 3, None, 0.02) == (1, 1, 1)
    assert layer_groups(
        Chosen(lambda length: [torch.arange(2), torch.arange(1), torch.arange(1)]), 3, None, 0.02
    ) == (1, 2)


def test_a_profile_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(PolicyError, match="2 layers, the model has 6"):
        layer_groups(get_policy("layer_aware"), LAYERS, profile(1, 2), 0.02)


@pytest.fixture(scope="module", params=[{}, {"explicit_mask": True}], ids=["causal", "mask"])
def found(request: pytest.FixtureRequest) -> ExportInput:
    model = tiny_vlm(num_layers=2, **request.param)
    return capture_for_export(model, tiny_vlm_inputs(5, 4, [(20, 0)]), tiny_shapes())


def both_forms(found: ExportInput) -> tuple[DecoderForm, DecoderForm, Manifest]:
    """Of the graph, and of what a manifest says of it; masks come from the graph itself."""
    form = DecoderForm.of(found.decoder, found.facts, cold_program(found.decoder).recorded, (1, 1))
    spec = decoder_spec(found, form, "fingerprint", ("mask.0",), (), ("mask.0",))
    manifest = bare_manifest(decoder=spec)
    kept = [index for index, name in enumerate(found.inputs) if name]

    def spans(*args: Any) -> Sequence[Tensor]:
        whole: list[Any] = [None] * len(found.inputs)
        for index, value in zip(kept, args, strict=True):
            whole[index] = value
        return form.identifier.masks(*whole)

    def leaves(*args: Any) -> Sequence[Any]:
        whole: list[Any] = [None] * len(found.inputs)
        for index, value in zip(kept, args, strict=True):
            whole[index] = value
        made = zip(spec.leaves, form.leaves.read(whole), strict=True)
        return [value for leaf, value in made if leaf.input is None]

    return form, decoder_form(manifest, spans, leaves, torch.device("cpu")), manifest


def test_a_form_survives_the_manifest(found: ExportInput) -> None:
    before, after, manifest = both_forms(found)
    for name in ("num_layers", "num_outputs", "tail", "rows", "groups", "dtype", "device"):
        assert getattr(after, name) == getattr(before, name)
    assert after.computation == before.computation
    assert after.layout.startswith(before.layout)  # and says which other weights there are
    assert len(after.layout) > len(before.layout)
    assert after.model_fingerprint == "fingerprint"
    assert after.weights == after.writes == ()
    assert manifest.decoder.inputs == tuple(name for name in found.inputs if name)
    assert after.positions(9).tolist() == before.positions(9).tolist() == [8]  # type: ignore[union-attr]


def test_spans_are_found_without_the_graph(found: ExportInput) -> None:
    _, after, manifest = both_forms(found)
    inputs = tiny_vlm_inputs(7, 3, [(20, 0), (9, 1)])
    assert found.split is not None
    features = torch.randn(29, 16)
    named = {**inputs, "features.0": features}
    runs = after.identifier.runs([named[name] for name in manifest.decoder.inputs])
    assert runs is not None
    samples, tokens, spans = runs
    assert (samples, tokens) == (1, inputs["input_ids"].shape[1])
    assert [(run.start, run.length) for run in spans] == [(7, 20), (29, 9)]
    assert torch.equal(spans[1].content[0], features[20:])
    short = {**named, "features.0": features[:-1]}
    assert after.identifier.runs([short[name] for name in manifest.decoder.inputs]) is None


def test_masks_are_looked_at_without_the_graph(found: ExportInput) -> None:
    _, _, manifest = both_forms(found)
    check = MaskCheck.of(found.decoder, found.facts)
    after = mask_check(manifest, lambda *args: [])
    sites = [replace(site, source_line=without_folders(site.source_line)) for site in check.sites]
    assert list(after.sites) == sites
    assert after.every_layer_has_one == check.every_layer_has_one
    names = [found.inputs[index] for index in check.inputs]
    assert [manifest.decoder.inputs[index] for index in after.inputs] == names
