"""A point of a tiny model: systems, modes and records. Times are not checked."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.point import Point, measure_point, runs_of_point
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.systems import Systems, Variant
from vlcache_fx.bench.workload import RequestShape, make_workload

VARIANTS = (Variant("first_k", 0.02), Variant("first_k", 0.2), Variant("uniform", 0.2))


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(find_preset("tiny"), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def measured(model: Any) -> tuple[Point, int]:
    runs: list[int] = []
    workload = make_workload(model, RequestShape(120))
    systems = Systems(model, "eager", VARIANTS)
    return measure_point(systems, workload, 2, 1, lambda: runs.append(1)), len(runs)


def test_measure_point_every_system(measured: tuple[Point, int]) -> None:
    point, runs = measured
    warm = [f"warm {variant.label}" for variant in VARIANTS]
    assert {"eager", "plain", "cold", *warm} <= set(point.seconds)
    assert len(point.seconds["eager"]) == 1
    assert all(len(values) == 2 for name, values in point.seconds.items() if name != "eager")
    assert runs == sum(map(len, point.seconds.values())) <= runs_of_point(VARIANTS, 2, 1)
    assert point.not_reused == {}
    assert set(point.peak_memory) == set(point.seconds)


def test_measure_point_warm_runs(measured: tuple[Point, int]) -> None:
    point, _ = measured
    for variant, run in zip(VARIANTS, point.warm.values(), strict=True):
        assert run.variant == variant
        assert run.tier == "memory"
        assert run.report["mode"] == "warm"
        assert run.report["spans"][0]["start"] == point.starts[1] != point.starts[0]
        assert 0 < run.report["token_layer_fraction"] <= variant.budget
        assert {"identify", "lookup", "plan", "run", "other"} <= set(run.step_ms)


def test_measure_point_rows_of_the_floor(measured: tuple[Point, int]) -> None:
    point, _ = measured
    for run in point.warm.values():
        assert point.floor_rows[run.floor] == run.report["rows_per_layer"][0]
    assert len(point.floor_rows) == 2  # two variants of equal budgets share a prefix hit


def test_measure_point_cold_equals_unmodified_model(measured: tuple[Point, int]) -> None:
    point, _ = measured
    assert point.cold_difference is not None
    assert point.cold_difference < 1e-5
    assert point.cold_rows[0] == point.num_tokens


def test_measure_point_is_json(measured: tuple[Point, int]) -> None:
    assert json.loads(json.dumps(asdict(measured[0])))["vision_tokens"] == 120


@pytest.mark.thorough
def test_measure_point_batch(model: Any) -> None:
    workload = make_workload(model, RequestShape(24, batch=2))
    point = measure_point(Systems(model, "eager", [Variant()]), workload, 1, 1)
    assert point.seconds["plain"]
    if point.not_reused:
        assert set(point.seconds) == {"eager", "plain", "not reused"}
        assert point.not_reused["vlcache"]
        assert point.warm == {}
    else:
        assert point.seconds["warm"]


def test_measure_point_lost_donors(model: Any) -> None:
    systems = Systems(model, "eager", [Variant()])
    workload = make_workload(model, RequestShape(24))
    prepare = systems.prepare_warm

    def lose_donors(variant: Variant) -> None:
        prepare(variant)
        if (
            systems.graphs_compiled()
            and len(systems.engine.store)
            and systems.engine.stats()["calls"]["warm"]
        ):
            systems.engine.clear()

    systems.prepare_warm = lose_donors  # type: ignore[method-assign]
    with pytest.raises(MeasurementError, match="the run 'warm' was cold"):
        measure_point(systems, workload, 1, 1)


@pytest.mark.thorough
def test_measure_point_of_a_hybrid() -> None:
    """All systems run, and the cold program equals the unmodified model."""
    hybrid = build_model(find_preset("tiny-hybrid"), torch.float32, torch.device("cpu"))
    workload = make_workload(hybrid, RequestShape(120))
    systems = Systems(hybrid, "eager", [Variant("uniform", 0.1)])
    point = measure_point(systems, workload, 1, 1)
    assert point.not_reused == {}
    assert set(point.seconds) == {"eager", "plain", "cold", "warm", "floor"}
    assert point.cold_difference is not None
    assert point.cold_difference < 1e-5
    assert point.floor_rows["floor"] == point.warm["warm"].report["rows_per_layer"][0]
    assert point.warm["warm"].report["token_layer_fraction"] == pytest.approx(0.1)
    assert point.eager_recurrences
