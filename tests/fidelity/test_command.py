"""``vlcache fidelity`` and ``vlcache calibrate``, as people call them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_fx.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", "nowhere"], "no model 'nowhere': give one of reference, photo, or a folder"),
        (["fidelity", "reference", "--policy", "best"], "unknown policy 'best'"),
        (["fidelity", "reference", "--budget", "2"], "must be a share in [0, 1], not 2.0"),
        (["fidelity", "reference", "--family", "two"], "unknown family 'two'"),
        (["fidelity", "reference", "--profile", "no.json"], "cannot read the profile 'no.json'"),
        (["calibrate", "reference", "--data", "no.jsonl"], "cannot read the prompts 'no.jsonl'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path)])
    assert "has no questions of its own: give prompts with --data" in result.output
    data.write_text("")
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path), "--data", str(data)])
    assert "no two prompts are about the same images" in result.output
