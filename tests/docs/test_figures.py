"""What the manual shows of graphs and reports is what the code makes now; pictures can be drawn."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..runtime.helpers import own_compiler_state
from .blocks import ROOT

pytest.importorskip("matplotlib", reason="needs the extra demo")

FIGURES = ROOT / "docs" / "figures"


def load(name: str) -> ModuleType:
    """The module of ``docs/figures/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, FIGURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_graphs_of_now(tmp_path: Path) -> None:
    """After an intended change: ``make figures``."""
    graphs = load("graphs")
    with own_compiler_state():
        sections, recorder, warm = graphs.all_sections()
    for name in graphs.PAGES:
        page = ROOT / "docs" / name
        assert graphs.write_sections(page, sections) == page.read_text(encoding="utf-8")
    graphs.draw(recorder, warm, tmp_path / "tokens.svg")
    assert (tmp_path / "tokens.svg").stat().st_size > 1000


def test_write_sections_fills_the_places_that_it_knows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\n```diff\nold\n```\n<!-- x: end -->\nb\n", encoding="utf-8")
    text = load("graphs").write_sections(page, {"x": "+new", "y": "unused"})
    assert text == "a\n<!-- x: begin -->\n```diff\n+new\n```\n<!-- x: end -->\nb\n"


def record() -> dict[str, Any]:
    """As ``make demo`` writes it, as far as the picture needs it."""
    report = {"rows_per_layer": [12, 2]}
    point = {
        "num_tokens": 110,
        "vision_tokens": 100,
        "starts": [4, 6],
        "seconds": {"plain": [3.0, 2.0], "cold": [2.0], "warm": [0.1], "floor": [0.2]},
        "warm": {"warm": {"report": report}},
    }
    return {
        "bench": {
            "machine": {"processor": "Some CPU", "cores": 2, "torch": "2"},
            "size": {"parameters": 1_000_000, "layers": 8},
            "dtype": "bfloat16",
            "points": [{"point": point}],
        }
    }


def test_pieces_split_a_warm_prompt() -> None:
    point = record()["bench"]["points"][0]["point"]
    pieces = load("request").pieces(point, warm=True)
    assert [count for _, count, _ in pieces] == [6, 2, 98, 4]
    cold = load("request").pieces(point, warm=False)
    assert [count for _, count, _ in cold] == [4, 100, 6]


def test_main_draws_from_what_the_demo_wrote(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps(record()), encoding="utf-8")
    output = tmp_path / "request.svg"
    load("request").main(["--record", str(tmp_path / "demo.json"), "--output", str(output)])
    assert output.read_text(encoding="utf-8").startswith("<?xml")


def test_layer_of_a_page() -> None:
    page = "<h2>Times</h2>1<h2>Layer 0, before</h2>the layer<h2>Graphs</h2>2"
    section = load("explain").layer_of(page)
    assert section.endswith("<main><h2>Layer 0, before</h2>the layer</main>")


def test_pictures_need_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(SystemExit, match="need one of chromium"):
        load("explain").main([])
