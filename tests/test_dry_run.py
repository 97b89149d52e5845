"""The option ``dry_run``: graphs are explained, and nothing is compiled or stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from vlcache_fx.errors import Reason
from vlcache_fx.lowering import EagerLowering
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import own_compiler_state, with_api, with_backend

FIRST, SECOND = tiny_vlm_inputs(3, 2, [(20, 0)]), tiny_vlm_inputs(6, 4, [(20, 0)], text_seed=1)


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture(autouse=True)
def _nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        pytest.fail("a dry run lowered a program")

    monkeypatch.setattr(EagerLowering, "lower", fails)


def test_dry_run_is_the_unmodified_model(caplog: pytest.LogCaptureFixture) -> None:
    pair = with_api(tiny_vlm(), dry_run=True)
    with caplog.at_level(logging.INFO, logger="vlcache_fx"):
        for inputs in (FIRST, SECOND):
            off, report = pair.run(**inputs)
            assert off == 0.0
            assert (report["mode"], report["reason_code"]) == ("bypass", Reason.DRY_RUN)
    (graph,) = pair.engine.explanations
    assert (graph.kind, graph.num_layers) == ("decoder", 2)
    assert "dry run: decoder of 2 layers (2 causal)" in caplog.text
    assert len(pair.engine.store) == 0
    assert pair.engine.stats()["calls"] == {"cold": 0, "warm": 0, "bypass": 2}


@pytest.mark.parametrize("strict", [False, True])
def test_dry_run_explains_refusals(strict: bool) -> None:
    pair = with_backend(tiny_vlm(learned_positions=True), dry_run=True, strict=strict)
    off, report = pair.run(**FIRST)
    assert off == 0.0
    assert report["reason_code"] is Reason.DRY_RUN
    (graph,) = pair.engine.explanations
    assert (graph.kind, graph.reason_code) == ("unmodified", Reason.POSITION_IN_STREAM)
    assert graph.summary().startswith("unmodified: graph not supported [position_in_stream]")


def test_dry_run_of_recurrent_layers() -> None:
    pair = with_api(tiny_hybrid("dcda"), dry_run=True)
    off, _ = pair.run(**FIRST)
    assert off == 0.0
    (graph,) = pair.engine.explanations
    assert graph.layer is not None
    assert (graph.layer.index, graph.layer.repeats) == (0, 2)  # the two delta rules
    assert "recurrent" in {mark for line in graph.layer.before for mark in line.marks}


def test_dry_run_stores_no_encoder_outputs() -> None:
    pytest.importorskip("transformers")
    from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

    pair = with_api(tiny_qwen2_5_vl(2), dry_run=True, min_span_tokens=4)
    inputs = qwen_inputs(4, 5, [(8, 12, 0)])
    for _ in range(2):
        off, report = pair.run(**inputs)
        assert off < 1e-5
        assert report["reason_code"] is Reason.DRY_RUN
    assert "decoder" in [graph.kind for graph in pair.engine.explanations]
    assert len(pair.engine.store) == 0
