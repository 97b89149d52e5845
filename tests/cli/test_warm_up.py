"""Output of ``vlcache warm-up``; ``tests/serve/test_warm_up.py`` tests what it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_fx.cli import app
from vlcache_fx.serve.artifacts import Manifest
from vlcache_fx.serve.options import ServeOptions

from .helpers import failure, run


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The output folder of a command that compiles nothing."""

    def warm_up(options: ServeOptions, output: Path) -> Manifest:
        print("a library says")  # noqa: T201
        output.mkdir()
        (output / "kernel").write_bytes(b"1" * 2**20)
        return Manifest({"torch": "2"}, 3, options.models, 7)

    monkeypatch.setattr("vlcache_fx.serve.warm_up.warm_up", warm_up)
    return tmp_path / "new"


def test_json(folder: Path) -> None:
    result = CliRunner().invoke(app, ["warm-up", "reference", "--output", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["models"], found["num_programs"], found["num_threads"]) == (["reference"], 7, 3)
    assert (found["output"], found["nbytes"]) == (str(folder), 2**20)
    assert found["seconds"] >= 0


def test_line(folder: Path) -> None:
    output = run("warm-up", "reference", "photo", "--output", str(folder))
    assert f"7 programs for reference, photo are in {folder} (1.0 MiB, " in output


def test_mistakes(tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "new"))
    assert "no model 'nothing'" in failure("warm-up", "nothing", *output)
    assert "batch_size=0 is not valid" in failure("warm-up", "reference", *output, "--batch-size", "0")
    (tmp_path / "file").write_text("")
    assert "is not empty" in failure("warm-up", "reference", "--output", str(tmp_path))
