"""Predicted times of explained calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlcache_fx.bench.model import decoder_size
from vlcache_fx.bench.predicted import with_predictions
from vlcache_fx.bench.rates import Rates
from vlcache_fx.bench.roofline import bound
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state, with_api

RATES = Rates(matmul_flops=1e9, copy_bytes=1e9, read_bytes=1e9)


def test_sizes_of_plain_models_are_unknown() -> None:
    with own_compiler_state():
        pair = with_api(tiny_vlm())
        found = with_predictions(pair.engine.explain(**tiny_vlm_inputs(3, 2, [(20, 0)])), pair.model, RATES)
    assert (found.predictions.full, found.predictions.request) == (None, None)
    assert "the sizes of TinyVlm are unknown" in found.predictions.note


def test_predictions_are_bounds_of_the_roofline() -> None:
    pytest.importorskip("transformers")
    from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

    def of(text: int) -> dict[str, Any]:
        return qwen_inputs(text, 5, [(8, 12, 0)])

    with own_compiler_state():
        pair = with_api(tiny_qwen2_5_vl(2), min_span_tokens=4, budget=0.1)
        with torch.no_grad():
            pair.model(**of(4))
        found = with_predictions(pair.engine.explain(**of(7)), pair.model, RATES)
    assert found.mode == "warm"
    assert found.report is not None
    full, request = found.predictions.full, found.predictions.request
    assert full is not None
    assert request is not None
    assert request.flops < full.flops
    assert request.ms < full.ms
    (sample,) = found.samples
    media = {
        token
        for start, end in [(s.start, s.start + s.length) for s in found.report.spans]
        for token in range(start, end)
    }
    text = [token for token in range(sample.num_tokens) if token not in media]
    size = decoder_size(pair.model)
    expected = bound(size, RATES, found.report.rows_per_layer, sample.num_tokens, text)
    assert expected is not None
    assert request.flops == expected.flops
    assert request.ms == pytest.approx(expected.seconds * 1e3)
    assert "1 GFLOP/s" in found.predictions.note
