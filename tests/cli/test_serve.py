"""``vlcache serve``: mistakes on the command line. ``tests/serve`` tests the server."""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vlcache_fx.cli import app

from .helpers import failure

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield str(other.getsockname()[1])


def fails(*arguments: str) -> str:
    """The one line that the command prints before it exits with status 1."""
    output = failure("serve", *arguments)
    assert "Traceback" not in output
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "no model 'nothing': it must be one of reference, photo, hybrid, or a folder"),
        (("reference", "reference"), "two models are named 'reference'"),
        (("reference", "--port", "70000"), "port=70000"),
        (("reference", "--host", "no.such.host.invalid"), "host='no.such.host.invalid' is not valid"),
        (("reference", "--budget", "7"), "budget=7"),
        (("reference", "--batch-size", "0"), "batch_size=0"),
        (("reference", "--capacity", "much"), "--capacity"),
        (("reference", "--max-image", "-1"), "--max-image"),
        (("reference", "--device", "cpu", "--dtype", "float7"), "float7"),
        (("reference", "--no-reuse", "--store", "memory://"), "--no-reuse stores nothing"),
        (("reference", "--artifacts", "/nowhere"), "'/nowhere' has no artifacts.json"),
        (("reference", "--allow-media-folder", "/nowhere"), "media folder '/nowhere'"),
        (("reference", "--api-key-file", "/nowhere"), "the API keys in '/nowhere' cannot be read"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    assert message in fails(*arguments)


def test_port_in_use(taken_port: str) -> None:
    message = fails("reference", "--port", taken_port)
    assert f"cannot listen on 127.0.0.1:{taken_port}" in message
    assert "in use" in message


def test_folders_without_a_model(tmp_path: Path) -> None:
    """The server starts, and ends with the reason."""
    (tmp_path / "empty").mkdir()
    assert f"cannot load the model in '{tmp_path}/empty'" in fails(f"{tmp_path}/empty", "--port", "0")
    (tmp_path / "a@b").mkdir()
    assert "rename it" in fails(f"{tmp_path}/a@b")
    (tmp_path / "keys").write_text("\n")
    assert "has no API key" in fails("reference", "--api-key-file", f"{tmp_path}/keys")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, *given: Any) -> Any:
        return None if name == "uvicorn" else found(name, *given)

    monkeypatch.setattr("vlcache_fx.serve.extra.find_spec", find)
    assert "serving needs uvicorn: pip install 'vlcache_fx[serve]'" in fails("reference")


class ReadyAtOnce:
    """In the place of a server, or of replicas."""

    replicas = 2

    def __init__(self, options: Any, *given: Any) -> None:
        self.url, self._ready = "http://127.0.0.1:1", given[-1]
        models = SimpleNamespace(sources=dict.fromkeys(options.models))
        self.service = SimpleNamespace(models=models)

    def run(self) -> None:
        print("a library says")  # noqa: T201
        self._ready(self.url)


@pytest.fixture
def _ready_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlcache_fx.serve.server.Server", ReadyAtOnce)
    monkeypatch.setattr("vlcache_fx.serve.cluster.run.Cluster", ReadyAtOnce)


@pytest.mark.usefixtures("_ready_at_once")
@pytest.mark.parametrize(("more", "replicas"), [((), None), (("--replicas", "2"), 2)])
def test_ready(more: tuple[str, ...], replicas: int | None) -> None:
    """A line, or one JSON object; the rest goes to stderr."""
    text = CliRunner().invoke(app, ["serve", "reference", *more])
    assert text.exit_code == 0, text.output
    start = "serving reference at http://127.0.0.1:1/v1" + (", replicas: 2" if replicas else "")
    assert text.stdout.startswith(f"a library says\n{start} (ready after ")
    as_json = CliRunner().invoke(app, ["serve", "reference", "photo", *more, "--json"])
    assert len(as_json.stdout.splitlines()) == 1
    found = json.loads(as_json.stdout)
    assert found.pop("seconds") >= 0
    assert found == {
        "url": "http://127.0.0.1:1/v1",
        "models": ["reference", "photo"],
        "replicas": replicas,
    }


def test_manual_names_every_option() -> None:
    command: Any = typer.main.get_command(app)
    page = PAGE.read_text(encoding="utf-8")
    names = [
        name for option in command.commands["serve"].params for name in option.opts if name.startswith("--")
    ]
    assert len(names) > 20
    assert [name for name in names if name != "--help" and f"`{name}" not in page] == []
