"""The checks of a release pass for what is built, and find what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vlcache_fx.version import VERSION

pytest.importorskip("build")
pytest.importorskip("packaging")

ROOT = Path(__file__).parents[1]
INFO = f"vlcache_fx-{VERSION}.dist-info"
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def distributions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributions", ROOT / ".ci/distributions.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["distributions"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(distributions: ModuleType) -> Files:
    """The files of a wheel as it should be, but for its metadata."""
    code = {name: path.read_bytes() for name, path in distributions.package_files(ROOT).items()}
    return {**code, f"{INFO}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(), f"{INFO}/METADATA": b""}


@pytest.mark.slow
def test_built_wheel_is_complete_and_small(distributions: ModuleType, tmp_path: Path) -> None:
    source = distributions.copy_tree(ROOT, tmp_path / "source")
    assert (source / "vlcache_fx/py.typed").is_file()
    assert not list(source.glob("*.egg-info"))
    (built,) = distributions.build(source, tmp_path / "dist", "--wheel")
    held = distributions.contents(built)
    distributions.check_wheel(held, source)
    assert built.stat().st_size < 2e6  # sources: 1.0 MB in 2026; the smallest weights have 5 MB
    metadata = held[f"{INFO}/METADATA"]
    with pytest.raises(distributions.ReleaseError, match="version"):
        distributions.check_metadata(metadata.replace(VERSION.encode(), b"9.9", 1), source)
    with pytest.raises(distributions.ReleaseError, match="not_a_licence"):
        distributions.check_metadata(metadata.replace(b": Apache-2.0", b": not_a_licence", 1), source)


@pytest.mark.parametrize("name", ["vlcache_fx/py.typed", "vlcache_fx/passes/base.py", "vlcache_fx/api.py"])
def test_missing_file_is_found(distributions: ModuleType, wheel: Files, name: str) -> None:
    del wheel[name]
    with pytest.raises(distributions.ReleaseError, match=f"the wheel lacks: {name}"):
        distributions.check_wheel(wheel, ROOT)


@pytest.mark.parametrize("name", ["examples/demo.py", "vlcache_fx/removed.py", "tests/conftest.py"])
def test_file_that_does_not_belong_is_found(distributions: ModuleType, wheel: Files, name: str) -> None:
    wheel[name] = b""
    with pytest.raises(distributions.ReleaseError, match=f"should not have: {name}"):
        distributions.check_wheel(wheel, ROOT)


def test_changed_file_is_found(distributions: ModuleType, wheel: Files) -> None:
    wheel["vlcache_fx/api.py"] += b"#"
    with pytest.raises(distributions.ReleaseError, match=r"changed in the wheel: vlcache_fx/api\.py"):
        distributions.check_wheel(wheel, ROOT)


def test_missing_licence_is_found(distributions: ModuleType, wheel: Files) -> None:
    del wheel[f"{INFO}/licenses/LICENSE"]
    with pytest.raises(distributions.ReleaseError, match="no LICENSE"):
        distributions.check_wheel(wheel, ROOT)


def test_sdist_with_tests_or_without_sources_is_found(distributions: ModuleType) -> None:
    needed = [str(path.relative_to(ROOT)) for path in distributions.package_files(ROOT).values()]
    held = dict.fromkeys([*needed, *distributions.IN_SDIST], b"")
    distributions.check_sdist(held, ROOT)
    with pytest.raises(distributions.ReleaseError, match=r"should not have: tests/test_api\.py"):
        distributions.check_sdist({**held, "tests/test_api.py": b""}, ROOT)
    del held["passes/base.py"]
    with pytest.raises(distributions.ReleaseError, match=r"lacks: passes/base\.py"):
        distributions.check_sdist(held, ROOT)


def test_different_wheels_are_found(distributions: ModuleType) -> None:
    distributions.check_equal({"a": b"1"}, {"a": b"1"})
    with pytest.raises(distributions.ReleaseError, match="differs between the wheels: a"):
        distributions.check_equal({"a": b"1"}, {"a": b"2"})
    with pytest.raises(distributions.ReleaseError, match="in one of the wheels only: b"):
        distributions.check_equal({"a": b"1"}, {"a": b"1", "b": b""})
