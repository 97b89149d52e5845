"""pyproject.toml agrees with the files on disk, and the wheel contains them."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.version import VERSION

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"vlcache_fx": "vlcache_fx", "passes": "vlcache_fx.passes", "policies": "vlcache_fx.policies"}


def packages_on_disk() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for directory in sorted({path.parent for path in (ROOT / folder).rglob("*.py")}):
            inner = directory.relative_to(ROOT / folder).parts
            found[".".join((package, *inner))] = directory
    return found


def test_pyproject_lists_packages_on_disk() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == set(packages_on_disk())


@pytest.mark.parametrize("directory", packages_on_disk().values(), ids=packages_on_disk().keys())
def test_packages_have_docstrings(directory: Path) -> None:
    assert (directory / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def entry_points() -> list[tuple[str, str]]:
    groups = [PROJECT["project"]["scripts"], *PROJECT["project"]["entry-points"].values()]
    return [(name, value) for group in groups for name, value in group.items()]


@pytest.mark.parametrize(("name", "value"), entry_points())
def test_entry_points_load(name: str, value: str) -> None:
    module, _, attribute = value.partition(":")
    for folder, package in sorted(FOLDERS.items(), key=lambda item: len(item[1]), reverse=True):
        if module.startswith(f"{package}."):
            path = ROOT / folder / module.removeprefix(f"{package}.").replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            break
    pattern = rf'^(def|class) {attribute}\b|^{attribute}\b.*=|^    if name != "{attribute}"'
    assert re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE), f"{path} has no {attribute}"


def test_make_env_pins_versions() -> None:
    pinned = set()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==[0-9][A-Za-z0-9.]*", line)
            assert match, f"not a plain pin: {line}"
            pinned.add(match[1].lower().replace("_", "-"))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in ("transformers", "mooncake-cpu", "dev", "demo", "docs"):
        wanted += extras[extra]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= pinned


@pytest.mark.slow
def test_wheel_contains_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "-w", str(tmp_path)]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"vlcache_fx/py.typed"}
    for package, directory in packages_on_disk().items():
        sources = [*directory.glob("*.py"), *directory.glob("*.cpp")]
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in sources}
    assert held == expected
    assert wheel.stat().st_size < 2e6  # sources: 1.0 MB in 2026; the smallest weights have 5 MB


def test_citation_has_the_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {VERSION}" in lines
