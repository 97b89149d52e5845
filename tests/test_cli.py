"""The console script."""

import pytest
from typer.testing import CliRunner

import vlcache_fx
from vlcache_fx.cli import app
from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import known_policies


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_version() -> None:
    assert run("version").strip() == vlcache_fx.__version__


def test_policies_lists_them_with_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = run("policies")
    for name, entry in known_policies().items():
        assert name in output
        assert entry.value in output
    assert "All rows in all layers" in output


def test_an_error_is_a_message_not_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PolicyError("two policies are named 'x'")

    monkeypatch.setattr("vlcache_fx.policies.known_policies", fail)
    result = CliRunner().invoke(app, ["policies"])
    assert result.exit_code == 1
    assert "error: two policies are named 'x'" in result.output


def test_help_names_the_commands() -> None:
    output = run("--help")
    assert "version" in output
    assert "policies" in output
