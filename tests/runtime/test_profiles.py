"""A profile is used for its own model only."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Profile
from vlcache_fx.policies.auto import Auto
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, with_backend

LAYERS = 3
CURVE = ((0.0, 0.5), (0.5, 0.1), (1.0, 0.0))
ONE, MOVED = tiny_vlm_inputs(5, 6, [(40, 0)]), tiny_vlm_inputs(9, 6, [(40, 0)], text_seed=2)


@pytest.fixture(scope="module")
def pair(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS), budget=0.1, lowering="eager")


def own_profile(pair: Pair) -> Profile:
    report = pair.run(**ONE)[1]
    return Profile(report["model_fingerprint"], "float32", (1.0, 1.0, 0.0), CURVE)


def test_own_profile_shapes_plans(pair: Pair) -> None:
    profile = own_profile(pair)
    flat = pair.run(**MOVED)[1]["rows_per_layer"]
    with pair.engine.using(profile=profile):
        shaped = pair.run(**MOVED)[1]["rows_per_layer"]
    assert flat[:LAYERS] == (flat[0],) * LAYERS
    assert shaped[0] == shaped[1] > flat[0] > shaped[2]


@pytest.mark.parametrize(
    "change", [{"model_fingerprint": "another"}, {"dtype": "bfloat16"}, {"library_version": "0.0.0"}]
)
def test_profile_of_other_model_is_ignored(
    pair: Pair, change: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    profile = dataclasses.replace(own_profile(pair), **change)
    flat = pair.run(**MOVED)[1]["rows_per_layer"]
    with pair.engine.using(profile=profile), caplog.at_level(logging.WARNING, "vlcache_fx"):
        for _ in range(2):
            assert pair.run(**MOVED)[1]["rows_per_layer"] == flat
    said = [record.message for record in caplog.records if record.name == "vlcache_fx"]
    assert [next(iter(change.values())) in message for message in said] == [True]


@pytest.mark.usefixtures("_compiler")
def test_strict_raises_profile_of_other_model() -> None:
    pair = with_backend(tiny_vlm(num_layers=LAYERS), budget=0.1, lowering="eager", strict=True)
    profile = dataclasses.replace(own_profile(pair), model_fingerprint="another")
    with (
        pair.engine.using(profile=profile),
        pytest.raises(PolicyError, match=r"model_fingerprint 'another', this is '[0-9a-f]{64}'; calibrate"),
    ):
        pair.run(**MOVED)


def test_missing_profile_costs_reuse_only(pair: Pair) -> None:
    profile, failures = own_profile(pair), pair.engine.stats()["plan_failures"]
    with pair.engine.using(policy=Auto(0.05)):
        assert pair.run(**MOVED)[1]["mode"] == "bypass"
    assert pair.engine.stats()["plan_failures"] == failures + 1
    with pair.engine.using(policy=Auto(0.05), profile=profile):
        assert pair.run(**MOVED)[1]["mode"] == "warm"


@pytest.mark.usefixtures("_compiler")
def test_set_budget_keeps_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    Profile("another", "float32", (1.0,)).save(path)
    engine = with_backend(tiny_vlm(num_layers=LAYERS), lowering="eager", profile=path).engine
    path.unlink()  # read once: the file may go
    engine.set_budget(0.5)
    assert engine.settings.current.budget == engine.options.budget == 0.5
    assert engine.settings.current.profile == Profile("another", "float32", (1.0,))
