"""The console script, called as people call it."""

from __future__ import annotations

from typer.testing import CliRunner

from vlcache_fx.cli import app


def run(*arguments: str) -> str:
    """The output of a command that succeeds."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def failure(*arguments: str) -> str:
    """The output of a command that fails with a message."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    return result.output
