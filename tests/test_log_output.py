"""``VLCACHE_LOG`` shows the log of a process that has not configured logging itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vlcache_fx.runtime import state
from vlcache_fx.runtime.engine import ServingEngine

APPLY = "from vlcache_fx.log_output import apply_log_variable; shown = apply_log_variable()\n"
SAY = "for level in ('debug', 'info', 'warning'): getattr(logging.getLogger('vlcache_fx.a'), level)(level)\n"


def stderr_of(value: str | None, *lines: str) -> str:
    """What a process with this value of the variable writes to stderr."""
    environment = {name: text for name, text in os.environ.items() if name != "VLCACHE_LOG"}
    if value is not None:
        environment["VLCACHE_LOG"] = value
    code = "import logging\n" + "".join(lines)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("debug", ["DEBUG", "INFO", "WARNING"]),
        ("info", ["INFO", "WARNING"]),
        ("INFO", ["INFO", "WARNING"]),
        ("warning", ["WARNING"]),
    ],
)
def test_levels(value: str, shown: list[str]) -> None:
    lines = stderr_of(value, APPLY, APPLY, "assert shown\n", SAY).splitlines()
    assert [line.split()[2] for line in lines] == shown
    assert [line.split()[3] for line in lines] == [level.lower() for level in shown]


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable(value: str | None) -> None:
    """As without this module: Python itself shows warnings."""
    assert stderr_of(value, APPLY, "assert not shown\n", SAY) == "warning\n"


def test_bad_value_is_one_warning() -> None:
    output = stderr_of("loud", APPLY, APPLY, "assert not shown\n")
    assert output == "vlcache: VLCACHE_LOG='loud' is not valid: it must be one of debug, info, warning\n"


@pytest.mark.parametrize(
    "configured",
    [
        "logging.basicConfig(format='own %(message)s')\n",
        "logging.getLogger('vlcache_fx').setLevel(logging.ERROR)\n",
        "logging.getLogger('vlcache_fx').addHandler(logging.NullHandler())\n",
    ],
)
def test_configuration_of_the_application_stays(configured: str) -> None:
    with_variable = stderr_of("debug", configured, APPLY, "assert not shown\n", SAY)
    assert with_variable == stderr_of(None, configured, SAY)


def test_configuration_that_comes_later() -> None:
    """No message is shown twice."""
    output = stderr_of("info", APPLY, "logging.basicConfig(format='own %(message)s')\n", SAY)
    assert output == "own info\nown warning\n"


def test_import_alone_does_nothing() -> None:
    code = "import vlcache_fx.log_output\nassert not logging.getLogger('vlcache_fx').handlers\n"
    assert stderr_of("debug", code, SAY) == "warning\n"


def test_engines_apply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(state, "apply_log_variable", lambda: calls.append(True))
    ServingEngine()
    assert calls == [True]
