"""Configuration of all tests: reproducible properties, golden files, and tests that need a GPU."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.compatibility import Writer

# The same examples in every run, and no time limit per example, for slow machines.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")

# Torch collects garbage after each compilation, among the objects of all tests. It reads this at its import.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files from the tests' output"
    )
    parser.addoption(
        "--thorough", action="store_true", help="run the long tests as well, mostly covered by others"
    )
    parser.addoption("--all-families", action="store_true", help="test every family of docs/families.md")
    parser.addoption("--write-compatibility", metavar="PAGE", help="write what works with what, see -m works")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.write_compatibility:
        config.pluginmanager.register(Writer(Path(config.option.write_compatibility)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("thorough") and not item.config.getoption("--thorough"):
            item.add_marker(pytest.mark.skip(reason="takes long; pass --thorough"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # not at the top: it takes a second, and not all tests need it

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup() -> Generator[None]:
    _stop_the_structured_trace()
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Generator[None]:
    _stop_the_structured_trace()
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown() -> Generator[None]:
    _stop_the_structured_trace()
    return (yield)


def _stop_the_structured_trace() -> None:
    """Take pytest's handlers from torch's structured trace.

    Pytest captures every logger that does not propagate. Torch takes that for a wish to trace, and then
    prints each graph, guard and stack as JSON: a tenth of the time of tests that compile.
    """
    trace = logging.getLogger("torch.__trace")
    for handler in [*trace.handlers]:
        if type(handler).__module__ == "_pytest.logging":
            trace.removeHandler(handler)


@pytest.fixture(autouse=True, scope="session")
def _collections_are_rare() -> Iterator[None]:
    """Collect garbage rarely: tracing creates millions of objects, whose scans took a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    yield
    gc.set_threshold(*before)


@pytest.fixture(autouse=True, scope="module")
def _collections_stay_short() -> Iterator[None]:
    """Exempt objects of earlier test files, such as torch's caches, from garbage collection.

    After some hundred tests, a collection took seconds, and torch collects often.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return a function ``golden(name, text)`` that compares text with ``golden/name.txt`` next to the test.

    With ``--update-golden`` the function writes the file instead.
    """

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} does not exist; run pytest --update-golden"
        # Compare plain strings, so that pytest shows a diff.
        assert text == path.read_text(encoding="utf-8"), (
            f"{path} differs; after an intended change, run pytest --update-golden"
        )

    return check
