"""Shared by all tests: reproducible properties, golden files, and tests that need a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Same examples in every run, and no time limit per example: the machines that run this are shared.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files with what tests produce"
    )
    parser.addoption(
        "--thorough", action="store_true", help="also what takes long and is mostly tested elsewhere"
    )
    parser.addoption("--all-families", action="store_true", help="try every named family")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("thorough") and not item.config.getoption("--thorough"):
            item.add_marker(pytest.mark.skip(reason="takes long; pass --thorough"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here: it takes a second, and not all tests need it

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _collections_are_rare() -> Iterator[None]:
    """Tracing makes objects by the million: searching them for garbage took a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    yield
    gc.set_threshold(*before)


@pytest.fixture(autouse=True, scope="module")
def _collections_stay_short() -> Iterator[None]:
    """What a file of tests leaves behind, torch's caches above all, is not searched again and again.

    After some hundred tests that took seconds each time, and torch collects often.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares text with ``golden/name.txt`` beside the test file.

    With ``--update-golden`` it writes the file instead.
    """

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} does not exist; run pytest --update-golden"
        # Both plain strings, so that pytest shows the lines that differ.
        assert text == path.read_text(encoding="utf-8"), (
            f"{path} differs; run pytest --update-golden if meant"
        )

    return check
