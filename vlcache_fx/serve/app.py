"""The application: transformers' server with our models, handlers and routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp
from transformers.cli.serving.server import build_server

from vlcache_fx.lowering.disk_cache import Compilations
from vlcache_fx.serve.errors import RequestError, bad_request
from vlcache_fx.serve.examples import run_examples
from vlcache_fx.serve.garbage import collected_afterwards
from vlcache_fx.serve.handlers import ServedChat, ServedResponse
from vlcache_fx.serve.metrics import ServeMetrics, metrics_response
from vlcache_fx.serve.middleware import Gate
from vlcache_fx.serve.models import ServedModels
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.state import ServeState
from vlcache_fx.serve.versions import taken

log = logging.getLogger("vlcache_fx.serve")

ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/models")
"""The routes of transformers' server that stay. Others load models, or drop them, or are for other models."""


class Service:
    """A server's models, queues and application.

    Args:
        options: what is served, and how.

    Attributes:
        app: the ASGI application. It loads the models when it starts, and is ready after that.
        failure: why a model could not be loaded; None if all is well.
        on_ready, on_failure: called in the event loop, at most once.

    Raises:
        OptionError: a model does not exist.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options, self.metrics = options, ServeMetrics()
        self.models, self.state = ServedModels(options), ServeState(options, self.metrics)
        self.failure: Exception | None = None
        self.is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self.app: ASGIApp = self._build()

    def _build(self) -> ASGIApp:
        chat = ServedChat(self.models, self.state, self.options)
        response = ServedResponse(self.models, self.state, self.options)
        handlers = {
            "model_manager": self.models,
            "chat_handler": chat,
            "response_handler": response,
            "generation_state": self.state,
        }
        dropped = ("completion_handler", "transcription_handler", "systemone_handler")  # and so their routes
        app = build_server(**taken(build_server, {**dict.fromkeys(dropped), **handlers}))
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]
        app.router.lifespan_context = self._lifespan
        app.add_api_route("/v1/models/{name}", self._model)
        app.add_api_route("/health", self._health)
        app.add_api_route("/live", self._live)
        app.add_api_route("/metrics", self._metrics)
        _add_error_handlers(app)
        return Gate(app, self.options, self.metrics, lambda: self.is_stopping)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG002
        self._loop = asyncio.get_running_loop()
        task = asyncio.create_task(self.start())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.stop()

    async def stop(self) -> None:
        """End all threads, and close the models' stores."""
        self.is_stopping = True
        await asyncio.to_thread(self.state.shutdown)
        await asyncio.to_thread(self.models.shutdown)

    def begin_to_stop(self) -> None:
        """Refuse new requests; end those that run when their time is over. From any thread."""
        self.is_stopping = True
        loop, timeout_s = self._loop, self.options.shutdown_timeout_s

        def wait() -> None:
            assert loop is not None
            loop.call_later(timeout_s, lambda: loop.run_in_executor(None, self.state.shutdown))

        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(wait)

    async def start(self) -> None:
        """Load the models and let them answer examples; sets ``failure`` if one cannot."""
        try:
            for name in self.models.sources:
                log.info("%s: loading", name)
                begin = time.perf_counter()
                model, _ = await asyncio.to_thread(self.models.load, name)
                self.metrics.add_engine(name, model.vlcache)
                loaded, programs = time.perf_counter(), Compilations()
                with collected_afterwards():
                    await run_examples(name, self.models, self.state.batcher(name, model), self.options)
                self.models.is_now_ready(name)
                elapsed_s = time.perf_counter() - loaded
                log.info(
                    "%s: loaded in %.1f s, ready after another %.1f s: %d programs compiled, %d from disk",
                    name,
                    loaded - begin,
                    elapsed_s,
                    programs.num_compiled,
                    programs.num_found,
                )
            self.on_ready()
        except Exception as error:  # noqa: BLE001 - whoever runs the server reports it
            self.failure = error
            self.on_failure()

    async def _model(self, name: str) -> JSONResponse:
        for entry in self.models.get_gen_models():
            if entry["id"] == name:
                return JSONResponse(entry)
        raise self.models.unknown(name)

    async def _health(self) -> JSONResponse:
        is_well = self.models.is_ready and not self.is_stopping
        status = (
            "ok" if is_well else "stopping" if self.is_stopping else "failed" if self.failure else "starting"
        )
        return JSONResponse({"status": status, "models": self.models.states()}, 200 if is_well else 503)

    async def _live(self) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    def _metrics(self) -> Response:
        return metrics_response(self.metrics.text())


def _add_error_handlers(app: FastAPI) -> None:
    """Errors of any kind become error objects, without paths and tracebacks."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, __: RequestValidationError) -> Response:
        return bad_request("the body must be a JSON object, sent as application/json").response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("request %s failed", getattr(request.state, "request_id", ""), exc_info=error)
        return RequestError(500, "the server failed on this request", code="server_error").response()
