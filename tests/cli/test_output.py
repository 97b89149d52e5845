"""Checks of files and folders before a command works, and output of libraries under ``--json``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vlcache_fx.cli.output import check_output_file, check_output_folder, print_json, stdout_for_json
from vlcache_fx.errors import OptionError


def test_checks_create_nothing(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b")
    check_output_file(tmp_path / "a" / "profile.json")
    assert list(tmp_path.iterdir()) == []


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(OptionError, match="no permission to write to"):
        check_output_folder(tmp_path / "a" / "b")


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="it is a folder"):
        check_output_file(tmp_path)
    path = tmp_path / "profile.json"
    path.write_text("")
    check_output_file(path)
    monkeypatch.setattr(os, "access", lambda other, mode: other != path)
    with pytest.raises(OptionError, match="no permission"):
        check_output_file(path)


@pytest.mark.parametrize("as_json", [True, False])
def test_libraries_do_not_mix_with_json(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with stdout_for_json(as_json):
        print("loading")  # noqa: T201
    print_json({"a": 1})
    out, err = capsys.readouterr()
    assert (err == "loading\n") is as_json
    assert json.loads(out.removeprefix("loading\n")) == {"a": 1}
    assert out.startswith("loading") is not as_json
