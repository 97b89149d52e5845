"""Modes of cold and warm runs of exported graphs are checked. Times are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from vlcache_fx.bench import onnx_ttft
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import RequestShape, make_workload
from vlcache_fx.deploy.sessions import OnnxSession


@pytest.mark.thorough
def test_measure_cold_and_warm(tmp_path: Path) -> None:
    model = build_model(find_preset("tiny").with_feature_tower(), torch.float32, torch.device("cpu"))
    report = onnx_ttft.export_preset(model, tmp_path / "export", 22)
    session = OnnxSession(report.directory)
    work = make_workload(model, RequestShape(120))
    times = onnx_ttft.measure(session, work, 3)
    assert times.num_tokens > times.vision_tokens > 60
    assert 0 < times.ratio.low <= times.ratio.median <= times.ratio.high
    with torch.no_grad():
        exact = model(**work.second).logits[:, -1:]
    session.vlcache.clear()
    torch.testing.assert_close(
        session.prefill(**onnx_ttft.inputs_of(work.second))["logits"], exact, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(MeasurementError, match="expected a cold run"):
        onnx_ttft.measure(OnnxSession(report.directory, policy="full", min_span_tokens=10_000), work, 1)
