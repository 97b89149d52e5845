"""Errors of ``vlcache calibrate``; ``tests/fidelity/test_reference.py`` runs it."""

from pathlib import Path

from .helpers import failure


def test_calibrate_missing_prompts() -> None:
    message = "cannot read the prompts 'no.jsonl'"
    assert message in failure("calibrate", "reference", "--data", "no.jsonl")


def test_calibrate_folder_without_a_model(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    output = failure("calibrate", str(tmp_path))
    assert "has no questions: pass prompts with --data" in output
    data.write_text("")
    output = failure("calibrate", str(tmp_path), "--data", str(data))
    assert "no two prompts have the same images" in output
