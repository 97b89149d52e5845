"""A replica: a whole server without a socket, in a process that Ray runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from typing import Any

from vlcache_fx.log_output import apply_log_variable
from vlcache_fx.serve.asgi import ends_answer, mark_seen, replay
from vlcache_fx.serve.cluster.route import Route
from vlcache_fx.serve.exchange import SCOPE_ENTRY
from vlcache_fx.serve.options import ServeOptions

log = logging.getLogger("vlcache_fx.serve")

ACCEPTED = "vlcache.accepted"
"""Type of the first message of an answer, which names the replica."""


class Replica:
    """Loads the models of a server, and answers the requests that a router sends.

    The constructor returns when the models are ready: Ray sends nothing before.

    Args:
        options: what is served, and how.
        threads: threads of torch.

    Raises:
        OptionError: a model or its artifacts cannot be loaded.
    """

    async def __init__(self, options: ServeOptions, threads: int) -> None:  # type: ignore[misc]
        import torch
        from ray import serve

        from vlcache_fx.serve.app import Service
        from vlcache_fx.serve.artifacts import using
        from vlcache_fx.serve.cluster.held import HeldPictures

        begin = time.perf_counter()
        _show_log()
        torch.set_num_threads(threads)
        self.name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(options)
        self._held = HeldPictures()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack = ExitStack()
        try:
            if options.artifacts is not None:
                self._stack.enter_context(using(options.artifacts, str(self._service.models.device)))
            await self._service.start()
            if self._service.failure is not None:
                raise self._service.failure
        except BaseException:
            await self.stop()
            raise
        # Ray awaits what it finds under this name. Python's collection would call a method, but not await it.
        self.__del__ = self.stop
        log.info("replica %s is ready after %.1f s", self.name, time.perf_counter() - begin)

    async def answer(
        self, route: Route, scope: dict[str, Any], body: bytes
    ) -> AsyncIterator[list[Mapping[str, Any]]]:
        """Answer an HTTP request.

        Args:
            route: its pictures.
            scope: the ASGI scope.
            body: the whole body.

        Yields:
            Lists of ASGI messages, after one message of the type ``vlcache.accepted``. Closing the iterator
            tells the application that the client went away.
        """
        yield [{"type": ACCEPTED, "replica": self.name}]
        messages: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        scope = scope | {"headers": [tuple(pair) for pair in scope["headers"]]}
        task: asyncio.Task[None] = asyncio.create_task(
            self._service.app(scope, replay(body, gone), messages.put)  # type: ignore[arg-type]
        )
        # The task outlives a client that goes away, by the time that the application takes to see it.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        task.add_done_callback(mark_seen)  # after an answer of status 500, starlette raises what caused it
        try:
            is_complete = is_over = False
            while not (is_complete or is_over):
                ready = [await messages.get()]
                while not messages.empty():
                    ready.append(messages.get_nowait())
                is_over = ready[-1] is None
                found = [message for message in ready if message is not None]
                is_complete = any(map(ends_answer, found))
                if found:
                    yield found
            if not is_complete:
                task.result()
        finally:
            gone.set()
            exchange = scope.get(SCOPE_ENTRY)
            if exchange is not None:
                self._held.add(route.pictures, exchange.donor_keys)

    async def health(self) -> dict[str, Any]:
        """The replica's name, and the states of its models."""
        return {"replica": self.name, "models": self._service.models.states()}

    async def metrics(self) -> tuple[str, list[Any]]:
        """The replica's name, and its metrics as ``prometheus_client`` collects them."""
        registry = self._service.metrics.registry
        return self.name, await asyncio.to_thread(lambda: list(registry.collect()))

    async def check_health(self) -> None:
        """Raise if the replica cannot answer; Ray then replaces it. Called by Ray.

        Raises:
            RuntimeError: a model is not ready, or its thread has ended.
        """
        if not self._service.models.is_ready or not self._service.state.is_alive:
            raise RuntimeError(f"replica {self.name} cannot answer: {self._service.models.states()}")

    async def record_routing_stats(self) -> dict[str, Any]:
        """The pictures whose donors are in memory. Called by Ray, which hands it to the routers."""
        stores = [engine.store for engine in self._service.models.engines.values()]
        return {"pictures": await asyncio.to_thread(self._held.in_memory, stores)}

    async def stop(self) -> None:
        """End all threads and close the stores. Called by Ray, when no request is left."""
        await self._service.stop()
        self._stack.close()


def _show_log() -> None:
    """Let the package's log go to stderr, which Ray collects and shows; unless it goes somewhere already."""
    logger = logging.getLogger("vlcache_fx")
    if apply_log_variable() or logger.hasHandlers():
        return
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
