"""Programs compiled ahead of time, used by other processes from other folders."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlcache_fx.errors import OptionError
from vlcache_fx.serve import artifacts
from vlcache_fx.serve.artifacts import CACHE_VARIABLE, MANIFEST, PROGRAMS, Manifest, recording, using

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from vlcache_fx.lowering import CompileCache, InductorLowering
from vlcache_fx.lowering.disk_cache import Compilations
from vlcache_fx.serve.artifacts import Manifest, recording, using

def compute():
    x = torch.ones(5, 8)
    graph = make_fx(lambda x: (torch.softmax(x * 3, -1) + 1,), tracing_mode="symbolic")(x)
    lowered = InductorLowering(CompileCache()).lower(graph, name="program")
    return lowered([x])[0]

folder, programs = Path(sys.argv[2]), Compilations()
if sys.argv[1] == "record":
    with recording(folder):
        result = compute()
    Manifest.here("cpu", ("a model",), programs.num_compiled).write(folder)
else:
    with using(folder, "cpu"):
        result = compute()
assert torch.allclose(result, torch.full((5, 8), 1.125)), result
print(programs.num_compiled, programs.num_found)
"""


def run(mode: str, folder: Path, log: Path) -> tuple[int, int, list[str]]:
    """Run the program in a process of its own; return programs compiled and found, and calls of g++."""
    wrapper = log.parent / mode / "g++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nPATH="{os.environ["PATH"]}" exec g++ "$@"\n')
    wrapper.chmod(0o755)
    log.unlink(missing_ok=True)
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(folder)],
        env={**os.environ, "PATH": path, "CXX": "g++"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled, found = map(int, done.stdout.split())
    return compiled, found, log.read_text().splitlines()


def test_another_process_compiles_nothing(tmp_path: Path) -> None:
    """The folder was moved and is read-only; the compiler is only asked for its version."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    compiled, found, calls = run("record", made, tmp_path / "g++.log")
    assert (compiled, found) == (1, 0)
    assert any(".cpp" in call for call in calls)
    assert Manifest.read(made).num_programs == 1
    made.rename(moved)
    for path in [*moved.rglob("*"), moved]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = sorted(path.name for path in moved.rglob("*"))
    compiled, found, calls = run("use", moved, tmp_path / "g++.log")
    assert (compiled, found) == (0, 1)
    assert set(calls) <= {"--version", "-v"}
    assert sorted(path.name for path in moved.rglob("*")) == before
    for path in [moved, *moved.rglob("*")]:  # pytest removes it
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def made_in(folder: Path, manifest: Manifest | None = None) -> Path:
    (folder / PROGRAMS).mkdir(parents=True)
    (manifest or Manifest.here("cpu", ("reference",), 3)).write(folder)
    return folder


def test_manifest_is_read_back(tmp_path: Path) -> None:
    folder = made_in(tmp_path / "artifacts")
    found = Manifest.read(folder)
    assert found == Manifest.here("cpu", ("reference",), 3)
    assert found.environment["torch"] == torch.__version__
    found.check(folder, "cpu")


@pytest.mark.parametrize("name", ["torch", "transformers", "vlcache_fx", "python", "platform", "device"])
def test_another_environment_is_refused(tmp_path: Path, name: str) -> None:
    here = Manifest.here("cpu")
    folder = made_in(tmp_path / "other", replace(here, environment={**here.environment, name: "other 1.0"}))
    with pytest.raises(OptionError, match=rf"{name} 'other 1\.0' \(here '.+'\); make them here"):
        Manifest.read(folder).check(folder, "cpu")
    with pytest.raises(OptionError, match="other versions"), using(folder, "cpu"):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"has no {MANIFEST}: vlcache warm-up MODEL"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 7}', "have format 7, not 1"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(OptionError, match=message):
        Manifest.read(tmp_path)


def test_folder_without_programs_is_refused(tmp_path: Path) -> None:
    Manifest.here("cpu").write(tmp_path)
    with pytest.raises(OptionError, match="cannot be copied"), using(tmp_path, "cpu"):
        pass


def test_recording_needs_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(OptionError, match="is not empty: name a new one"), recording(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "kept"
    with pytest.raises(OptionError, match="cannot be made"), recording(tmp_path / "mine" / "folder"):
        pass


def test_settings_of_the_process_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/before")
    num_threads = torch.get_num_threads()
    here = Manifest.here("cpu")
    folder = made_in(tmp_path / "artifacts", replace(here, num_threads=num_threads + 1))
    with using(folder, "cpu"):
        private = Path(os.environ[CACHE_VARIABLE])
        assert private.is_dir()
        assert private not in (folder, folder / PROGRAMS)
        assert torch.get_num_threads() == num_threads + 1
    assert os.environ[CACHE_VARIABLE] == "/before"
    assert torch.get_num_threads() == num_threads
    assert not private.exists()
    monkeypatch.delenv(CACHE_VARIABLE)
    with recording(tmp_path / "new"):
        assert os.environ[CACHE_VARIABLE] == str(tmp_path / "new" / PROGRAMS)
    assert CACHE_VARIABLE not in os.environ


def test_failed_warm_up_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), recording(tmp_path / "new"):
        raise RuntimeError("the model cannot be loaded")
    with pytest.raises(OptionError, match="has no"):
        Manifest.read(tmp_path / "new")


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    Manifest.here("cpu", ("a", "b"), 5).write(tmp_path)
    found = json.loads((tmp_path / MANIFEST).read_text())
    assert found.keys() == {"environment", "num_threads", "models", "num_programs", "format"}
    assert found["format"] == artifacts.FORMAT
