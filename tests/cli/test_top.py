"""``vlcache top`` against a server of the standard library that has a text of metrics."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlcache_fx.cli import app, top
from vlcache_fx.serve.metrics import ServeMetrics

from .helpers import failure, run


class Site(ThreadingHTTPServer):
    """Counts a request per scrape; after ``limit`` scrapes it fails."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.metrics, self.scrapes, self.limit = ServeMetrics(), 0, 1000

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.scrapes += 1
        is_found = self.path == "/metrics" and self.server.scrapes <= self.server.limit
        self.server.metrics.show_load("m", self.server.scrapes, 0)
        self.send_response(200 if is_found else 500)
        self.end_headers()
        if is_found:
            self.wfile.write(self.server.metrics.text().encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_once(site: Site) -> None:
    output = run("top", site.url, "--once")
    assert output.startswith(f"{site.url}/metrics\nspans reused: -; requests running: 0, waiting: 1\n")
    assert "time to first token" in output
    assert site.scrapes == 1


def test_json_per_sample(site: Site) -> None:
    """One line each, until the server fails."""
    site.limit = 3
    result = CliRunner().invoke(app, ["top", f"{site.url}/metrics", "--json", "--interval", "0.1"])
    assert result.exit_code == 1
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["waiting"] for one in found] == [1, 2, 3]
    assert found[0]["seconds"] is None
    assert found[1]["seconds"] >= 0.1
    assert result.stderr == f"error: cannot read metrics from {site.url}/metrics: status 500\n"


def test_json_once(site: Site) -> None:
    assert json.loads(run("top", site.url, "--json", "--once"))["waiting"] == 1


def test_pipes_get_a_table_per_sample(site: Site) -> None:
    site.limit = 2
    result = CliRunner().invoke(app, ["top", site.url, "--interval", "0.1"])
    assert result.stdout.count("spans reused: ") == 2
    assert "\x1b" not in result.stdout


def test_terminals_get_one_table_that_changes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "result_console", lambda: Console(force_terminal=True, width=100))
    site.limit = 3
    result = CliRunner().invoke(app, ["top", site.url, "--interval", "0.1"])
    assert result.exit_code == 1
    assert "\x1b[1A" in result.stdout  # the cursor goes up, to write over the table
    assert "waiting: 3" in result.stdout


def test_nothing_listens() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        output = failure("top", url, "--once")
    assert output.startswith(f"error: cannot read metrics from {url}/metrics: ")
    assert "Connection refused" in output
    assert len(output.splitlines()) == 1


def test_no_http() -> None:
    """Something else listens there."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def hang_up() -> None:
            client, _ = other.accept()
            client.sendall(b"220 mail\r\n")
            client.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        output = failure("top", f"http://127.0.0.1:{other.getsockname()[1]}", "--once")
        thread.join()
    assert len(output.splitlines()) == 1
    assert "cannot read metrics" in output


def test_interval_must_be_positive() -> None:
    assert CliRunner().invoke(app, ["top", "--interval", "0"]).exit_code == 2
