"""``vlcache doctor``: its output and exit status; ``tests/doctor`` tests the checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_fx.cli import app
from vlcache_fx.doctor import Check, Status

from .helpers import run

CHECKS = {
    "good": Check("good", Status.OK, "all of it"),
    "poor": Check("poor", Status.WARNING, "some [of] it", "get more"),
    "bad": Check("bad", Status.FAILED, "nothing", "get some"),
}


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Replaces the checks: a store's URL names its result. Has the URLs that were checked."""
    seen = []

    def checklist(urls: Sequence[str]) -> list[Check]:
        seen.append(urls)
        return [CHECKS[url] for url in urls if url in CHECKS]

    monkeypatch.setattr("vlcache_fx.doctor.checklist", checklist)
    return seen


def test_lines(stores: list[Sequence[str]]) -> None:
    output = run("doctor", "--store", "good", "--store", "poor")
    assert output.splitlines()[-4:] == [
        "ok      good: all of it",
        "warning poor: some [of] it",
        "        -> get more",
        "1 ok, 1 warning",
    ]
    assert stores == [("good", "poor")]


def test_failure_is_status_1(stores: list[Sequence[str]]) -> None:
    result = CliRunner().invoke(app, ["doctor", "--store", "bad", "--store", "good"])
    assert result.exit_code == 1
    assert "failed  bad: nothing\n        -> get some\n" in result.stdout
    assert result.stdout.endswith("1 ok, 1 failed\n")


@pytest.mark.parametrize(("names", "status"), [(("good", "poor"), 0), (("good", "bad"), 1)])
def test_json(stores: list[Sequence[str]], names: tuple[str, ...], status: int) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", *(f"--store={name}" for name in names)])
    assert result.exit_code == status
    found = json.loads(result.stdout)
    assert found["passed"] is (status == 0)
    assert found["checks"] == [CHECKS[name].as_dict() for name in names]


def test_memory_is_checked_by_default(stores: list[Sequence[str]]) -> None:
    run("doctor")
    assert stores == [("memory://",)]


@pytest.mark.slow
def test_this_installation(tmp_path: Path) -> None:
    """All checks of it, in the order of the list; a store that fails is one line."""
    url = "file:///dev/null/folder"
    result = CliRunner().invoke(app, ["doctor", "--json", "--store", f"file://{tmp_path}/s", "--store", url])
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 1
    assert [name for name, check in found.items() if check["status"] == "failed"] == [f"store {url}"]
    names = ["python", "vlcache_fx", "torch", "extra serve", "gpu", "threads", "torch.compile backend"]
    names += ["inductor on cpu", "kernels of vlcache_fx", f"store file://{tmp_path}/s", "self-test"]
    assert [name for name in found if name in names] == names
