"""Both programs run, and differ only in the last layer's rows. Times are not checked."""

import pytest
import torch

from vlcache_fx.bench import dead_rows
from vlcache_fx.bench.dead_rows import everything, main, measure_dead_rows
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.workload import RequestShape
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.options import Options
from vlcache_fx.passes.standard import cold_program
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs


def test_measure_dead_rows() -> None:
    model = build_model(find_preset("tiny").with_feature_tower(), torch.float32, torch.device("cpu"))
    found = measure_dead_rows(model, RequestShape(120), 3, Engine(Options(lowering="eager")))
    assert set(found.seconds) == {"all rows", "needed rows"}
    assert 0 < found.ratio.low <= found.ratio.median <= found.ratio.high
    assert found.num_tokens > 120


def test_everything_keeps_all_rows() -> None:
    captured, _ = captured_graph(tiny_vlm(), tiny_vlm_inputs(3, 2, [(20, 0)]), dynamic=True)
    assert [str(slot) for slot in cold_program(captured).slots] == ["rows.2", "results"]
    assert not everything(captured).slots


def test_main_prints_both_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dead_rows, "Engine", lambda: Engine(Options(lowering="eager")))
    main("tiny", 120, 1)
    printed = capsys.readouterr().out
    assert "last layer, all rows: " in printed
    assert "all / needed rows: " in printed
    assert "tiny, " in printed
