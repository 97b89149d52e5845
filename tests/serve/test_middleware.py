"""What the outermost layer does with a connection, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from vlcache_fx.serve.exchange import current_exchange
from vlcache_fx.serve.metrics import ServeMetrics
from vlcache_fx.serve.middleware import SPARE, Gate
from vlcache_fx.serve.options import ServeOptions

GONE = {"type": "http.disconnect"}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


class App:
    """Reads the body, waits for the client to go if told to, and answers."""

    def __init__(self, *, waits: bool = False) -> None:
        self.waits, self.bodies, self.gone = waits, [], []  # type: ignore[var-annotated]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = current_exchange()
        self.bodies.append((await receive())["body"])
        exchange.on_gone(lambda: self.gone.append(exchange.request_id))
        if self.waits:
            self.gone.append((await receive())["type"])
            return
        exchange.timings_ms["queue"] = 1.5
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": exchange.api_key.encode()})


def call(
    app: App,
    messages: Sequence[dict[str, Any]],
    *,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    stopping: bool = False,
    **given: Any,
) -> tuple[int | None, dict[str, str], bytes]:
    """Send messages; return status, headers and body of the answer."""
    sent: list[dict[str, Any]] = []
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        gate = Gate(app, ServeOptions(("reference",), **given), ServeMetrics(), lambda: stopping)
        pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": pairs}
        await asyncio.wait_for(gate(scope, receive, send), 10)

    asyncio.run(main())
    if not sent:
        return None, {}, b""
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent)


def code(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


def test_requests_pass_with_name_key_and_times() -> None:
    app = App()
    given = {"X-Request-Id": "a-1", "Authorization": "bearer  key "}
    status, headers, body = call(app, [part(b"on", more=True), part(b"e")], headers=given)
    assert (status, body, app.bodies) == (200, b"key", [b"one"])
    assert (headers["x-request-id"], headers["server-timing"]) == ("a-1", "queue;dur=1.50")


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, 'a"b'])
def test_bad_names_are_replaced(name: str) -> None:
    _, headers, _ = call(App(), [part(b"")], headers={"X-Request-Id": name})
    assert len(headers["x-request-id"]) == 36


def test_bodies_are_bounded() -> None:
    """By what is announced, and by what comes: a body may come in parts, without a length."""
    app = App()
    assert call(app, [], headers={"Content-Length": "11"}, max_body_bytes=10)[0] == 413
    parts = [part(b"12345", more=True), part(b"67890", more=True), part(b"1", more=True)]
    status, _, body = call(app, parts, max_body_bytes=10)
    assert (status, code(body), app.bodies) == (413, "too_large", [])
    assert call(app, [part(b"1234567890")], max_body_bytes=10)[0] == 200


def test_clients_that_go() -> None:
    while_sending, while_waiting = App(), App(waits=True)
    assert call(while_sending, [part(b"1", more=True), GONE])[0] is None
    assert while_sending.bodies == []
    call(while_waiting, [part(b"1"), GONE], headers={"X-Request-Id": "a"})
    assert while_waiting.gone == ["a", "http.disconnect"]


def test_keys_are_needed_below_v1_only() -> None:
    app = App()
    keys = {"api_keys": ("key",)}
    status, _, body = call(app, [part(b"")], **keys)
    assert (status, code(body), app.bodies) == (401, "invalid_api_key", [])
    assert call(app, [part(b"")], headers={"Authorization": "Basic key"}, **keys)[0] == 401
    assert call(app, [part(b"")], headers={"Authorization": "Bearer key"}, **keys)[0] == 200
    assert call(app, [part(b"")], path="/health", **keys)[0] == 200


def test_open_requests_are_bounded() -> None:
    """Before their bodies are read: bodies take memory."""
    statuses: list[int] = []

    async def main() -> None:
        gate = Gate(App(), ServeOptions(("m",), max_waiting=1, batch_size=1), ServeMetrics(), lambda: False)
        held = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await held.wait()
            return part(b"")

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": []}
        tasks = [asyncio.create_task(gate(dict(scope), receive, send)) for _ in range(2 + SPARE + 3)]
        await asyncio.sleep(0.05)
        assert statuses == [429] * 3
        held.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert statuses[3:] == [200] * (2 + SPARE)


def test_nothing_begins_while_the_server_stops() -> None:
    status, _, body = call(App(), [part(b"")], stopping=True)
    assert (status, code(body)) == (503, "shutting_down")
    assert call(App(), [part(b"")], path="/live", stopping=True)[0] == 200
