"""The console script as a whole: what holds for every command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import vlcache_fx
from vlcache_fx.cli import app
from vlcache_fx.errors import PolicyError

from .helpers import run

SCRIPT = [sys.executable, "-c", "from vlcache_fx.cli import app; app(prog_name='vlcache')"]
QUICK = [["--help"], ["version"], ["version", "--json"], ["policies"], ["policies", "--json"]]


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below a group, with the words that name them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def examples(names: tuple[str, ...]) -> list[str]:
    """The lines under "Examples" in a command's help."""
    lines = (COMMANDS[names].epilog or "").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def script(*arguments: str, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *arguments], text=True, check=False, stderr=subprocess.PIPE, **given)


def test_all_commands_are_tested() -> None:
    assert {("doctor",), ("top",), ("gate",), ("bench",), ("store", "ls"), ("store", "why")} <= set(COMMANDS)


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_prints_json(names: tuple[str, ...]) -> None:
    (option,) = [param for param in COMMANDS[names].params if "--json" in param.opts]
    assert "JSON" in option.help
    assert "stdout" in option.help


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_has_examples_in_its_help(names: tuple[str, ...]) -> None:
    """They begin with the command, and its parser takes them."""
    found = examples(names)
    assert any(line.startswith(f"vlcache {' '.join(names)}") for line in found)
    output = run(*names, "--help")
    for line in found:
        assert f"$ {line}" in output, "it is too long for a terminal of 80 characters"
        program, *words = shlex.split(line)
        assert program == "vlcache"
        (own,) = [own for own in COMMANDS if tuple(words[: len(own)]) == own]
        # Raises if an option or an argument is not valid.
        context = COMMANDS[own].make_context(line, words[len(own) :])
        assert context.params


def test_manual_names_every_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, *below in COMMANDS:
        assert f"`vlcache {name}`" in page
        assert all(f"`{word}`" in page for word in below)


def test_help_names_the_commands() -> None:
    output = run("--help")
    for names in COMMANDS:
        assert names[0] in output


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["version"], *([*names, "--help"] for names in COMMANDS)]
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom vlcache_fx.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version_option() -> None:
    assert run("--version") == f"vlcache {vlcache_fx.__version__}\n"


def test_completion_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in run("--help")
    for words, expected in [("vlcache ", "doctor"), ("vlcache gate --min", "--min-agreement")]:
        environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        done = script(
            env={**os.environ, **environment, "_VLCACHE_COMPLETE": "complete_bash"}, stdout=subprocess.PIPE
        )
        assert expected in done.stdout.split()


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_closed_pipe_has_no_traceback(arguments: list[str]) -> None:
    """As with ``| head -1`` whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = script(*arguments, stdout=writer)
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_output_of_pipes_is_plain_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No column is cut, whatever the terminal around the pipe."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")
    }
    done = script("policies", stdout=subprocess.PIPE, env={**environment, "COLUMNS": "40", "TERM": "xterm"})
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    from vlcache_fx.policies import known_policies

    assert known_policies()
    for name, entry in known_policies().items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"│ {name} ")]
        assert f" {entry.value} " in line


def test_log_variable() -> None:
    """The script applies it: a bad value is a warning, and the level debug has tracebacks of errors."""
    bad = script("version", stdout=subprocess.PIPE, env={**os.environ, "VLCACHE_LOG": "loud"})
    assert bad.stdout == f"{vlcache_fx.__version__}\n"
    assert bad.stderr.count("must be one of debug, info, warning") == 1
    wrong = ("top", "ftp://host")
    for level, has_traceback in [("debug", True), ("info", False)]:
        done = script(*wrong, stdout=subprocess.PIPE, env={**os.environ, "VLCACHE_LOG": level})
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is has_traceback
        assert done.stderr.splitlines()[-1].startswith("error: url='ftp://host' is not valid")


@pytest.mark.slow
def test_interrupt_ends_with_status_130(tmp_path: Path) -> None:
    """Ctrl-C while a command works."""
    code = (
        "import time\nfrom vlcache_fx.cli import app, top\n"
        "def wait(url):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "top.fetch = wait\napp(['top', '--once'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PolicyError("two policies are named 'x'"), 1, "error: two policies are named 'x'\n"),
        (PermissionError(13, "Permission denied", "/out/x"), 1, "error: '/out/x': Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (TimeoutError(), 1, "error: TimeoutError\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_messages(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("vlcache_fx.policies.known_policies", fail)
    result = CliRunner().invoke(app, ["policies"])
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", message)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vlcache_fx.policies.known_policies", fail)
    assert isinstance(CliRunner().invoke(app, ["policies"]).exception, RuntimeError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fidelity", "reference", "--count", "2", "--family", "single_hop", "--output-dir"],
        ["calibrate", "reference", "--count", "4", "--family", "single_hop", "--output"],
        ["export", "reference"],
        ["warm-up", "reference", "--output"],
        ["bench", "--preset", "tiny", "--output-dir"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_output_that_cannot_be_written(tmp_path: Path, arguments: list[str]) -> None:
    """Said before a model is loaded."""
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "file" / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "cannot be written to: " in result.stderr
    assert "Loading" not in result.stderr
