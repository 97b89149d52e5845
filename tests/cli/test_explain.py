"""``vlcache explain``: errors, and the reference model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlcache_fx.cli import app
from vlcache_fx.explaining import Explanation

from ..explaining.test_page import counts_of
from .helpers import failure

pytest.importorskip("transformers", reason="the reference model is one of transformers")
pytest.importorskip("sklearn", reason="the reference model is asked about digits of scikit-learn")

command = import_module("vlcache_fx.cli.explain")  # `cli` has a function of this name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model 'nowhere': it must be one of reference, photo, hybrid, smollm2, or a folder"),
        (["reference", "--budget", "2"], "option budget=2.0 is not valid"),
        (["reference", "--lowering", "fast"], "option lowering='fast' is not valid"),
        (["reference", "--policy", "best"], "unknown policy 'best'"),
        (["reference", "--data", "no.jsonl"], "cannot read the prompts 'no.jsonl'"),
        (["reference", "--html", "/dev/null/page.html"], "cannot be written to"),
    ],
)
def test_explain_bad_arguments(arguments: list[str], message: str) -> None:
    output = failure("explain", *arguments)
    assert message in output
    assert "Traceback" not in output


def test_explain_reference(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    result = CliRunner().invoke(
        app, ["explain", "reference", "--json", "--no-predict", "--budget", "0.1", "--html", str(path)]
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert "explaining the second prompt" in result.stderr
    assert data["mode"] == "warm"
    page = path.read_text(encoding="utf-8")
    assert data["counts"] == counts_of(page)
    assert data["counts"]["reused"] > data["counts"]["recomputed"] > 0
    (sample,) = data["samples"]
    assert sum(data["counts"].values()) == sample["num_tokens"] == len(sample["texts"])
    assert "&lt;|vision_start|&gt;" in page
    assert data["predictions"]["full"] is None


def test_explain_prompts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of the file is escaped in the page, and default output is text."""
    from vlcache_fx.testing import reference_vlm

    explanations: list[Explanation] = []

    def once(*given: Any) -> Explanation:
        if not explanations:
            explanations.append(explained(*given))
        return explanations[0]

    explained = command._explained
    monkeypatch.setattr(command, "_explained", once)

    question = reference_vlm.make_questions(count=1)[0]
    question.images[0].save(tmp_path / "a.png")
    prompt = reference_vlm.build_prompt(question)
    lines = [
        {"images": ["a.png"], "prompt": prompt, "answer": "1"},
        {"images": ["a.png"], "prompt": f"<script>alert(1)</script> {prompt}", "answer": "2"},
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    page = tmp_path / "page.html"
    result = CliRunner().invoke(
        app, ["explain", "reference", "--data", str(data), "--html", str(page), "--no-predict"]
    )
    assert result.exit_code == 0, result.output
    assert "<script" not in page.read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["explain", "reference", "--data", str(data), "--no-predict", "--graph"])
    assert result.exit_code == 0, result.output
    assert "\n+ [lookup] splice_rows_default = vlcache.splice_rows(" in result.stdout
    assert "image, reused" in result.stdout
    assert "Store hits" in result.stdout
