"""The command of the survey."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from vlcache_fx.testing.survey.outcome import Outcome

command = importlib.import_module("vlcache_fx.testing.survey.__main__")


def test_resume_keeps_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A survey takes an hour: what an earlier run found is not tried again."""
    tried: list[str] = []

    def try_family(name: str) -> Outcome:
        tried.append(name)
        return Outcome(name, "Class", {"vlcache_fx.compile": "reuse"})

    monkeypatch.setattr(command, "try_family", try_family)
    output = tmp_path / "outcomes.json"
    command.main(["llava"], output=output)
    command.main(["llava", "aria"], output=output, resume=True)
    assert tried == ["llava", "aria"]
    assert [one["model_type"] for one in json.loads(output.read_text("utf-8"))] == ["llava", "aria"]
    assert "- reuse: aria" in capsys.readouterr().out
    command.main(["aria"], output=output)
    assert tried == ["llava", "aria", "aria"]
