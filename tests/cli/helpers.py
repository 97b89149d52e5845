"""Runs the console script."""

from __future__ import annotations

from typer.testing import CliRunner

from vlcache_fx.cli import app


def run(*arguments: str) -> str:
    """Run a command that must succeed; return its output."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def failure(*arguments: str) -> str:
    """Run a command that must fail with a message; return its output."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    return result.output
