"""Models with wrapper subclasses as weights: captured, reused, distinguished."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import distance, own_compiler_state, vlcache_store
from ..store.scaled import DispatchAlone, Scaled, quantise

CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def prompt(seed: int = 0) -> dict[str, Any]:
    return tiny_vlm_inputs(5, 6, [(24, 0)], text_seed=seed)


def quantised() -> Any:
    torch.manual_seed(0)
    return quantise(tiny_vlm(num_layers=2))


def run(model: Any, reference: Any, seed: int) -> str:
    with torch.no_grad():
        assert distance(model(**prompt(seed)), reference(**prompt(seed))) < CLOSE
    mode: str = model.vlcache.last_report["mode"]
    return mode


def compiled(model: Any, **options: Any) -> Any:
    return vlcache_fx.compile(model, **{"lowering": "eager", "dynamic": True, "policy": "full"} | options)


@pytest.mark.parametrize(
    "lowering", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.thorough])]
)
def test_quantised_model_reuse(lowering: str) -> None:
    model, reference = compiled(quantised(), lowering=lowering), quantised()
    assert [run(model, reference, seed) for seed in range(3)] == ["cold", "warm", "warm"]
    assert model.vlcache.stats()["refusals"] == {}


def test_untraceable_class_runs_unmodified() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return quantise(tiny_vlm(num_layers=2), DispatchAlone)

    model, reference = compiled(make()), make()
    assert [run(model, reference, seed) for seed in range(2)] == ["bypass", "bypass"]
    reason = model.vlcache.last_report["reason"]
    assert "DispatchAlone" in reason
    assert "\n" not in reason


def test_changed_scale_other_donors() -> None:
    model, reference = compiled(quantised()), quantised()
    assert [run(model, reference, seed) for seed in range(2)] == ["cold", "warm"]
    for one in (model, reference):
        weight = one.decoder.layers[0].attention.key.weight
        assert isinstance(weight, Scaled)
        weight.scale.mul_(1.5)
    assert [run(model, reference, seed) for seed in (2, 3)] == ["cold", "warm"]


def test_other_scales_share_no_donors() -> None:
    store = vlcache_store()
    other = quantised()
    other.decoder.layers[1].attention.value.weight.scale.mul_(1.5)
    reference = quantised()
    reference.decoder.layers[1].attention.value.weight.scale.mul_(1.5)
    first, second = compiled(quantised(), store=store), compiled(other, store=store)
    assert run(first, quantised(), 0) == "cold"
    assert run(second, reference, 1) == "cold"


def test_other_context_shares_no_donors() -> None:
    store = vlcache_store()

    def shifted() -> Any:
        model = quantised()
        model.decoder.layers[1].attention.value.weight.zero = 40
        return model

    first, second = compiled(quantised(), store=store), compiled(shifted(), store=store)
    assert run(first, quantised(), 0) == "cold"
    assert run(second, shifted(), 1) == "cold"


def test_unreadable_weights_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    reference = tiny_vlm(num_layers=1)
    model = compiled(copy.deepcopy(reference))
    engine = model.vlcache
    fingerprints = engine.fingerprints

    class Unreadable:
        def of(self, tensors: Any) -> str:
            return str(fingerprints.of([*tensors, torch.empty(1, device="meta")]))

    engine.fingerprints = Unreadable()
    for seed in range(3):
        assert run(model, reference, seed) == "bypass"
    said = [r.getMessage() for r in caplog.records if r.name == "vlcache_fx" and r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "weights_unreadable" in said[0]
    assert "\n" not in said[0]
    engine.set_options(replace(engine.options, strict=True))
    with pytest.raises(UnsupportedGraphError, match="weights_unreadable"), torch.no_grad():
        model(**prompt())
