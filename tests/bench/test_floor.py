"""Prefix hits of decoders with recurrent layers."""

from typing import Any

import pytest
import torch

from vlcache_fx.bench.floor import PrefixHitBaseline
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import RequestShape, Workload, make_workload

ROWS = 15
"""Rows at the end of the request; all are text, whose embeddings the model makes by itself."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(find_preset("tiny-hybrid"), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def workload(model: Any) -> Workload:
    return make_workload(model, RequestShape(60, images=2))


def test_floor_of_a_hybrid_equals_the_whole_request(model: Any, workload: Workload) -> None:
    """Convolutions and recurrences continue from the states behind the reused tokens, in every run."""
    with torch.no_grad():
        expected = model(**workload.second).logits
        floor = PrefixHitBaseline(model, workload, ROWS, model=model)
        for _ in range(2):
            floor.prepare()
            torch.testing.assert_close(floor.run().logits, expected)
            floor.check()


def test_floor_of_a_hybrid_computes_the_last_rows(model: Any, workload: Workload) -> None:
    seen: list[int] = []

    def compiled(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    with torch.no_grad():
        floor = PrefixHitBaseline(compiled, workload, ROWS, model=model)
        floor.prepare()
        floor.run()
    assert seen == [ROWS]


def test_floor_of_a_hybrid_has_a_dynamic_cache(model: Any, workload: Workload) -> None:
    with torch.no_grad(), pytest.raises(MeasurementError, match="dynamic cache only"):
        PrefixHitBaseline(model, workload, ROWS, lambda: None, model)
