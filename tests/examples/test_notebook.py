"""The notebook runs from top to bottom, and shows what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from vlcache_fx.testing.reference_vlm import Question

from ..runtime.helpers import own_compiler_state

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; return the value of its last expression, as a notebook shows it."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def test_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert [(cell["execution_count"], cell["outputs"]) for cell in cells] == [(None, [])] * len(cells)


@pytest.mark.slow
def test_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    with own_compiler_state():
        cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
        shown = [run("".join(cell["source"]), names) for cell in cells]
    first: Question = names["first"]
    assert capsys.readouterr().out.splitlines() == [f"{first.answer} - expected: {first.answer}"] * 2
    picture, cold, warm, explanation, engine = shown[1:]
    assert picture is first.images[0]
    assert (cold.mode, warm.mode, explanation.mode) == ("cold", "warm", "warm")
    assert "<td>warm</td>" in warm._repr_html_()
    assert "image, recomputed" in explanation._repr_html_()
    assert "1 cold, 1 warm" in repr(engine)
