"""pyproject.toml agrees with the files on disk."""

import re
import tomllib
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


def test_citation_has_the_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {VERSION}" in lines


def test_changelog_and_citation_have_one_date() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(.+)\] - (.+)$", changelog, re.MULTILINE)
    assert latest is not None
    assert latest[1] == VERSION
    assert f'date-released: "{latest[2]}"' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_classifiers_and_tools_have_the_oldest_python() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    versions = [
        text.rpartition(" ")[2]
        for text in PROJECT["project"]["classifiers"]
        if text.startswith("Programming Language :: Python :: 3.")
    ]
    assert versions[0] == oldest
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
