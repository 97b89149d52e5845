"""What happens to every request before a handler sees it: name, key, size, and whether the client stays."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Callable
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlcache_fx.serve.asgi import ends_answer, replay, until_gone
from vlcache_fx.serve.errors import CLIENT_GONE, RequestError
from vlcache_fx.serve.exchange import SCOPE_ENTRY, Exchange, begin_exchange
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.request import check_api_key

log = logging.getLogger("vlcache_fx.serve")

REQUEST_ID = "x-request-id"
VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
API = "/v1/"
SPARE = 16
"""Open requests beyond those that wait and run: those whose bodies or pictures are being read."""


class CountsResponses(Protocol):
    """Metrics that count responses."""

    def saw_response(self, path: str, status: int) -> None:
        """Count a response."""


class Gate:
    """The outermost layer of the application.

    Args:
        app: the application.
        options: limits and keys.
        metrics: counts responses.
        is_stopping: whether the server shuts down; no request is begun then.
    """

    def __init__(
        self, app: ASGIApp, options: ServeOptions, metrics: CountsResponses, is_stopping: Callable[[], bool]
    ) -> None:
        self._app, self._options, self._metrics, self._is_stopping = app, options, metrics, is_stopping
        self._in_flight = 0
        self._most = (options.max_waiting + options.batch_size) * len(options.models) + SPARE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if VALID_ID.fullmatch(given) else str(uuid.uuid4())
        kind, _, key = headers.get("authorization", "").partition(" ")
        exchange = Exchange(request_id, key.strip() if kind.lower() == "bearer" else "")
        # transformers' middleware takes the name from here, whatever it is.
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != REQUEST_ID.encode()]
        scope["headers"].append((REQUEST_ID.encode(), request_id.encode()))
        begin_exchange(exchange)
        scope[SCOPE_ENTRY] = exchange
        status, is_complete = 500, False

        async def answer(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                found = MutableHeaders(scope=message)
                found[REQUEST_ID] = request_id
                timing = exchange.server_timing()
                if timing:
                    found["server-timing"] = timing
            is_complete = ends_answer(message)
            await send(message)

        try:
            await self._serve(scope, receive, answer, exchange)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            is_gone = exchange.is_gone and status != 200 and not is_complete
            self._metrics.saw_response(path, CLIENT_GONE if is_gone else status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        if not scope["path"].startswith(API):
            await self._app(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self._serve_api(scope, receive, send, exchange)
        finally:
            self._in_flight -= 1

    async def _serve_api(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        try:
            self._check_load()
            check_api_key(exchange.api_key, self._options.api_keys)
            body = await self._read(Headers(scope=scope), receive)
        except RequestError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        watcher = asyncio.create_task(_watch(receive, exchange))
        gone = asyncio.Event()
        exchange.on_gone(gone.set)
        try:
            await self._app(scope, replay(body, gone), send)
        finally:
            watcher.cancel()

    def _check_load(self) -> None:
        """Refuse requests before their bodies are read, if the queues cannot take them.

        Raises:
            RequestError: 503 while the server stops, 429 while too many requests are open.
        """
        if self._is_stopping():
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        if self._in_flight > self._most:
            raise RequestError(
                429, "too many requests are open: try again later", code="queue_full", retry_after_s=1
            )

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None if the client goes away meanwhile.

        Raises:
            RequestError: 413, it is too large.
        """
        limit = self._options.max_body_bytes
        refusal = RequestError(413, f"the request is too large: max_body_bytes is {limit}", code="too_large")
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise refusal
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise refusal
            if not message.get("more_body", False):
                return b"".join(parts)


async def _watch(receive: Receive, exchange: Exchange) -> None:
    await until_gone(receive)
    exchange.gone()
