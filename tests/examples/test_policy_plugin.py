"""The example of a policy in a separate package, installed into a separate environment."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlcache_fx.policies import known_policies

PLUGIN = Path(__file__).parents[2] / "examples/policy_plugin"


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def new_environment(directory: Path, visible: Sequence[str]) -> Path:
    """Create an environment that sees the packages in ``visible``; return its interpreter. Needs no network.

    Without pip: what would come with it (an old setuptools) would hide what is visible.
    """
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin/python"
    (own,) = directory.glob("lib/python*/site-packages")
    # `addsitedir` also follows .pth files, by which editable installs are found.
    lines = [f"import site; site.addsitedir({folder!r})" for folder in visible]
    (own / "visible.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return python


@pytest.mark.slow
def test_policy_plugin_installed_and_used(tmp_path: Path) -> None:
    assert "every_row_start" not in known_policies()
    source = tmp_path / "policy_plugin"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    python = new_environment(tmp_path / "environment", site.getsitepackages())
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, source)
    shutil.rmtree(source / "src")  # the test must import the installed package

    tests = ["-p", "no:cacheprovider", "-q", "-c", PLUGIN / "pyproject.toml", source / "tests"]
    assert "7 passed" in run(python, "-m", "pytest", *tests)
