"""Runs a cluster until it is told to stop."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from vlcache_fx.errors import OptionError
from vlcache_fx.options import Options
from vlcache_fx.serve.cluster.options import ClusterOptions
from vlcache_fx.serve.environment import environment
from vlcache_fx.serve.options import ServeOptions

log = logging.getLogger("vlcache_fx.serve")

APPLICATION = "vlcache"
SHARED = ("file://", "mooncake://")
MIB = 1024**2
REACH_S = 5.0


class Cluster:
    """An entrance and replicas on Ray Serve.

    Args:
        options: what each replica serves, and the address of the entrance.
        cluster: how many replicas, and where.
        on_ready: called with the URL when all replicas are ready.

    Attributes:
        url: where it listens.

    Raises:
        OptionError: the address cannot be used, or a model does not exist.
    """

    def __init__(
        self,
        options: ServeOptions,
        cluster: ClusterOptions,
        on_ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        from vlcache_fx.serve.server import bind, url_of

        self._options = with_absolute_paths(options)
        # Ray binds the address itself, later: a mistake must show at once.
        with bind(options.host, options.port) as listener:
            self._port, self.url = listener.getsockname()[1], url_of(listener)
        self._cluster, self._on_ready = cluster, on_ready
        self._stop = threading.Event()
        if not shares_donors(options):
            log.warning(
                "the replicas share no donors: add a tier that all reach, such as "
                "--store memory:// --store file:///folder"
            )

    def run(self) -> None:
        """Serve until a signal or ``stop``.

        Raises:
            OptionError: Ray cannot be reached, or a replica cannot load a model.
        """
        with environment(_variables(is_alone=self._cluster.ray_address is None)):
            self._connect()
            try:
                # After Ray has set its own handlers.
                with _signals():
                    self._start()
                    self._on_ready(self.url)
                    self._stop.wait()
            except KeyboardInterrupt:
                pass
            finally:
                self._end()

    def stop(self) -> None:
        """Stop as SIGTERM does. From any thread."""
        self._stop.set()

    def _end(self) -> None:
        """Let running requests end, and stop all that was started."""
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        try:
            # First the application: with Serve itself, connections would be cut.
            serve.delete(APPLICATION)
            if not serve.status().applications:
                serve.shutdown()  # nobody else's application needs it, and it holds the port
        except RayServeException:
            pass  # it was stopped before Serve ran
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        import ray

        cluster = self._cluster
        common: dict[str, Any] = {"namespace": "vlcache", "logging_level": logging.WARNING}
        try:
            if cluster.ray_address is not None:
                _check_reachable(cluster.ray_address)
                ray.init(address=cluster.ray_address, **common)
                return
            # Logical cores: replicas start even where there are fewer than they ask for.
            cores = max(os.cpu_count() or 1, math.ceil(cluster.most_replicas * cluster.cpus_per_replica))
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                object_store_memory=max(256 * MIB, 4 * self._options.max_body_bytes),
                **common,
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = "on this machine" if cluster.ray_address is None else f"at {cluster.ray_address!r}"
            raise OptionError(f"Ray cannot be reached {where}: {_last_line(str(error))}") from error

    def _start(self) -> None:
        import ray
        from ray import serve

        from vlcache_fx.serve.cluster.application import build_application

        cluster = self._cluster
        everywhere = cluster.ray_address is not None
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        try:
            serve.start(
                proxy_location="EveryNode" if everywhere else "HeadOnly",
                http_options={"host": self._options.host, "port": self._port},
                logging_config=quiet,
            )
        except TimeoutError as error:
            raise OptionError(f"the entrance at {self.url} does not start: {error}") from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        num_gpus = float(ray.cluster_resources().get("GPU", 0))
        application = build_application(
            self._options,
            cluster,
            threads=cluster.threads or max(1, (os.cpu_count() or 1) // cluster.replicas),
            gpus_per_replica=_gpus_per_replica(self._options, cluster, num_gpus),
        )
        try:
            serve.run(application, name=APPLICATION, logging_config=quiet)
        except RuntimeError as error:
            raise OptionError(f"the replicas cannot start: {self._reason() or error}") from error

    def _reason(self) -> str:
        """Why a deployment failed: the last line of the traceback that Ray reports."""
        from ray import serve

        found = serve.status().applications.get(APPLICATION)
        messages = [deployment.message for deployment in found.deployments.values()] if found else []
        return next((_error_in(message) for message in messages if _error_in(message)), "")


def with_absolute_paths(options: ServeOptions) -> ServeOptions:
    """The options for processes that run in other folders.

    Raises:
        OptionError: a model does not exist.
    """
    from vlcache_fx.fidelity.models import NAMED
    from vlcache_fx.serve.sources import check_sources

    models = [
        f"{name}={source if source in NAMED else Path(source).absolute()}"
        for name, source in check_sources(options.models).items()
    ]
    engine = dict(options.engine)
    if isinstance(engine.get("profile"), str | Path):
        engine["profile"] = Path(engine["profile"]).absolute()
    artifacts = None if options.artifacts is None else options.artifacts.absolute()
    return replace(options, models=tuple(models), engine=engine, artifacts=artifacts)


def shares_donors(options: ServeOptions) -> bool:
    """Whether one of the options' store tiers is shared between processes."""
    store = Options.parse(options.engine).store
    urls = [store] if isinstance(store, str) else store
    return any(isinstance(url, str) and url.startswith(SHARED) for url in urls)  # type: ignore[union-attr]


def _check_reachable(address: str) -> None:
    """Fail soon where nothing listens: Ray tries for minutes.

    Raises:
        OSError: nothing listens at an address with a port.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def _gpus_per_replica(options: ServeOptions, cluster: ClusterOptions, num_gpus: float) -> float:
    if cluster.gpus_per_replica is not None:
        return cluster.gpus_per_replica
    return 0.0 if options.device == "cpu" else min(1.0, num_gpus / cluster.most_replicas)


def _error_in(message: str) -> str:
    """The message of an error of this package in a traceback, or the traceback's last error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("vlcache_fx.errors.")]
    return own[-1].partition(": ")[2] if own else ""


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason is given"


def _variables(*, is_alone: bool) -> dict[str, str]:
    """Settings that Ray reads from the environment: no statistics to its makers, and time to compile.

    Args:
        is_alone: no other machine takes part: Ray then listens on the loopback address alone.
    """
    given = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "SERVE_SLOW_STARTUP_WARNING_S": "600",
        # On a busy machine an entrance takes longer than Ray's 5 s to start, and would be killed for it.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    if is_alone:
        # Its name tells of two systems, but it takes the loopback address for this machine's on all.
        given["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return given


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM raise ``KeyboardInterrupt`` in the body, as Ctrl-C does. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
