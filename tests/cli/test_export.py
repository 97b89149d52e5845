"""Output and errors of ``vlcache export``; ``tests/deploy/`` tests the exporter."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vlcache_fx
from vlcache_fx.cli import app
from vlcache_fx.deploy.describe import ExportReport

from .helpers import failure, run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model 'nowhere': it must be one of reference, photo, hybrid, or a folder"),
        (
            ["reference", "--dtype", "int3"],
            "dtype 'int3' is not valid: it must be one of float32, float16, bfloat16",
        ),
        (["reference", "--data", "no.jsonl"], "cannot read the prompts 'no.jsonl'"),
    ],
)
def test_export_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    model, *options = arguments
    assert message in failure("export", model, str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


REPORT = ExportReport(
    directory="out",
    size_bytes=3000,
    files={"decode.onnx": 1000, "decode.engine": 2000},
    lookups=({"slot": "k"},),
    restricted=({"layer": 0},),
    hoisted=("rows.0", "donor.0.k"),
    refused=({"graph": "encoder", "reason": "random"},),
    engines={"decode": {"size_bytes": 2000, "build_seconds": 1.5}},
)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the exporter, which prints as libraries do; has the arguments it was called with."""
    seen = []

    def export(model: Any, inputs: Any, directory: Path, **options: Any) -> ExportReport:
        print("a library says")  # noqa: T201
        seen.append(options)
        return REPORT

    monkeypatch.setattr(vlcache_fx, "export", export)
    monkeypatch.setattr("vlcache_fx.cli.export._example", lambda *_: (None, {}))
    return seen


def test_export_as_json(exported: list[dict[str, Any]], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "reference", str(tmp_path), "--opset", "23", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(json.dumps(REPORT.as_dict()))
    assert "a library says" in result.stderr
    assert exported[0]["opset"] == 23


@pytest.mark.usefixtures("exported")
def test_export_prints_files_and_refusals(tmp_path: Path) -> None:
    output = run("export", "reference", str(tmp_path))
    assert [line.split() for line in output.splitlines() if "decode.engine" in line] == [
        ["│", "decode.engine", "│", "2", "│", "1.5", "│"]
    ]
    assert "1 lookups in 1 layers; the warm graph has 2 inputs for donors and plan" in output
    assert "not exported: encoder: random" in output
