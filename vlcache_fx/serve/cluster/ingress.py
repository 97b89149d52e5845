"""The entrance of a cluster: takes HTTP requests, and hands each to a replica. Holds no model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlcache_fx.serve.asgi import ends_answer, until_gone
from vlcache_fx.serve.cluster.metrics import ClusterMetrics
from vlcache_fx.serve.cluster.replica import ACCEPTED
from vlcache_fx.serve.cluster.route import Route
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.exchange import current_exchange
from vlcache_fx.serve.metrics import metrics_response
from vlcache_fx.serve.middleware import API, REQUEST_ID, Gate
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.pictures import picture_digests
from vlcache_fx.serve.request import tenant_of

log = logging.getLogger("vlcache_fx.serve")

KNOWN_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health", "/live", "/metrics")
SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers"),
)
"""What a replica is told of a request."""
REPLICA = "x-vlcache-replica"
ACCEPT_S = 30.0
"""How long a request waits for a replica, when all have died or are full."""
ASK_S = 5.0
"""How long replicas may take to tell their health and metrics."""
ATTEMPTS = 2
DEAD = (RayActorError, DeploymentUnavailableError)


class Ingress:
    """The ASGI application of the entrance.

    Args:
        handle: Ray's handle of the replicas.
        options: limits and keys.
    """

    def __init__(self, handle: Any, options: ServeOptions) -> None:
        self._answers = handle.options(method_name="answer", stream=True)
        self._handle, self._options = handle, options
        self._metrics = ClusterMetrics()
        self.app: ASGIApp = _without_request_id(Gate(self._route, options, self._metrics, lambda: False))

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in KNOWN_PATHS:
            scope["route"] = SimpleNamespace(path=path)
        if path == "/live":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif path == "/health":
            await (await self._health())(scope, receive, send)
        elif path == "/metrics":
            await metrics_response(self._metrics.text(await self._ask("metrics")))(scope, receive, send)
        else:
            await self._forward(scope, receive, send)

    async def _health(self) -> JSONResponse:
        found = await self._ask("health")
        status = "ok" if found else "starting"
        replicas = {replica["replica"]: replica["models"] for replica in found}
        return JSONResponse({"status": status, "replicas": replicas}, 200 if found else 503)

    async def _ask(self, method: str) -> list[Any]:
        """The results of a method of all replicas that answer."""
        if not self._handle.running_replicas_populated():
            return []
        try:
            answers = self._handle.broadcast(method)
            found = await answers.results_async(timeout_s=ASK_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError, RayServeException):
            return []
        return [result for result in found if not isinstance(result, BaseException)]

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a replica answer. If it dies before anything is sent, another one begins anew."""
        # Of requests that are none of the API, the gate has not read the body: nobody needs it.
        body = (await receive())["body"] if scope["path"].startswith(API) else b""
        tenant = tenant_of(current_exchange().api_key) if self._options.salt_from_api_key else ""
        pictures = await asyncio.to_thread(picture_digests, body, tenant)
        told = {name: scope[name] for name in SCOPE if name in scope}
        avoid: list[str] = []
        for attempt in range(1, ATTEMPTS + 1):
            answer = _Answer(self._answers.remote(Route(pictures, tuple(avoid)), told, body))
            try:
                await answer.send_to(receive, send)
                return
            except RequestError as error:
                await error.response()(scope, receive, send)
                return
            except BackPressureError:
                await _busy().response()(scope, receive, send)
                return
            except DEAD as error:
                log.warning("replica %s died on a request: %s", answer.replica, type(error).__name__)
                if answer.has_begun:
                    self._metrics.lost.inc()
                    await answer.break_off(send)
                    return
                if attempt == ATTEMPTS:
                    await _failed(503).response()(scope, receive, send)
                    return
                avoid.append(answer.replica)
                self._metrics.retries.inc()
            except RayTaskError as error:
                log.error("a replica failed on a request: %s", type(error).__name__)
                if answer.has_begun:
                    await answer.break_off(send)
                else:
                    await _failed(500).response()(scope, receive, send)
                return


class _Answer:
    """The answer of one replica.

    Args:
        messages: Ray's iterator of lists of messages.

    Attributes:
        replica: its name, once it has accepted; empty before.
        has_begun: whether something of the answer was sent to the client.
    """

    def __init__(self, messages: Any) -> None:
        self._messages = messages
        self.replica = ""
        self.has_begun = self._is_complete = False
        self._is_stream = False

    async def send_to(self, receive: Receive, send: Send) -> None:
        """Send the answer to the client, or cancel it if the client goes away.

        Raises:
            RequestError: no replica accepts it.
            RayError: the replica died, or failed.
        """
        sending = asyncio.create_task(self._send_all(send))
        watching = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if self._is_complete or sending.done():
                # A client that has everything may go away before Ray's iterator has ended.
                await sending
        finally:
            watching.cancel()
            if not sending.done():
                sending.cancel()
                self._messages.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        async for messages in self._accepted():
            for message in messages:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)  # type: ignore[arg-type]
                    headers[REPLICA] = self.replica
                    self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
                self._is_complete = ends_answer(message)
                self.has_begun = True
                await send(message)  # type: ignore[arg-type]

    async def _accepted(self) -> AsyncIterator[list[Mapping[str, Any]]]:
        parts = aiter(self._messages)
        try:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes at the wrong moment.
            async with asyncio.timeout(ACCEPT_S):
                first = (await anext(parts))[0]
        except TimeoutError:
            raise RequestError(
                503, "no replica is ready: try again later", code="not_ready", retry_after_s=5
            ) from None
        assert first["type"] == ACCEPTED
        self.replica = first["replica"]
        async for messages in parts:
            yield messages

    async def break_off(self, send: Send) -> None:
        """End a stream that cannot go on with an error that clients know.

        Raises:
            ConnectionError: it is no stream: the client must see that the answer is cut off.
        """
        if self._is_complete:
            return
        if not self._is_stream:
            raise ConnectionError("the replica died while it sent an answer")
        event = f"data: {json.dumps(_failed(500).body())}\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _failed(status: int) -> RequestError:
    return RequestError(status, "the server failed on this request", code="server_error")


def _busy() -> RequestError:
    return RequestError(
        429, "too many requests wait for a replica: try again later", code="queue_full", retry_after_s=5
    )


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """Leave out the name of the request, since Ray's proxy adds it too."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _start_and_stop(receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await app(scope, receive, send_on if Headers(scope=scope).get(REQUEST_ID) else send)

    return answer


async def _start_and_stop(receive: Receive, send: Send) -> None:
    """Nothing is to be done when the entrance starts and stops."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
