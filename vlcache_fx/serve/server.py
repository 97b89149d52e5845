"""Runs the application until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType

import uvicorn

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.app import Service
from vlcache_fx.serve.artifacts import Manifest, using
from vlcache_fx.serve.options import ServeOptions

GRACE_S = 10
"""How much longer connections may take than requests, when the server stops."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; before models are loaded, so that a mistake shows at once.

    Raises:
        OptionError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OptionError(f"host={host!r} is not valid: {error.strerror or error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OptionError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of what listens on a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Tells the service at once that it ends: uvicorn still answers on connections that are open."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.begin_to_stop()
        super().handle_exit(sig, frame)


class Server:
    """A service on a socket.

    Args:
        options: what is served, and where.
        on_ready: called with the URL when all models are ready.

    Attributes:
        url: where it listens.

    Raises:
        OptionError: the address cannot be used, a model does not exist, or artifacts were made elsewhere.
    """

    def __init__(self, options: ServeOptions, on_ready: Callable[[str], None] = lambda _: None) -> None:
        self.service = Service(options)
        self._artifacts, self._device = options.artifacts, str(self.service.models.device)
        if self._artifacts is not None:
            Manifest.read(self._artifacts).check(self._artifacts, self._device)
        self._socket = bind(options.host, options.port)
        self.url = url_of(self._socket)
        config = uvicorn.Config(
            self.service.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            # The service itself ends what runs too long, with an answer; this is for what hangs.
            timeout_graceful_shutdown=round(options.shutdown_timeout_s) + GRACE_S,
        )
        self._server = _Server(config, self.service)
        self.service.on_ready = lambda: on_ready(self.url)
        self.service.on_failure = self.stop

    def run(self) -> None:
        """Serve until a signal or ``stop``.

        Raises:
            OptionError: a model could not be loaded, or the artifacts cannot be read.
        """
        programs = nullcontext() if self._artifacts is None else using(self._artifacts, self._device)
        try:
            with programs:
                self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self.service.failure is not None:
            raise self.service.failure

    def stop(self) -> None:
        """Stop as SIGTERM does, but end no process. From any thread."""
        self.service.begin_to_stop()
        self._server.should_exit = True
