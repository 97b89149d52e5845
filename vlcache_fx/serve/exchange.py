"""What a handler must know of the HTTP exchange beyond the body: the key, whether the client is still there.

transformers' routes hand the body and the request's name to a handler, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

SCOPE_ENTRY = "vlcache.exchange"
"""Entry of an ASGI scope with the exchange that answers it."""


@dataclass(eq=False)
class Exchange:
    """One HTTP request and its response. Used in the event loop only.

    Attributes:
        request_id: its name, sent back as ``X-Request-Id``.
        api_key: the key that the client sent; empty without one.
        timings_ms: steps and their times, sent as ``Server-Timing`` if known when the response begins.
        arrived_s: when it began, of ``time.perf_counter``.
        is_gone: whether the client went away.
        donor_keys: the keys of the donors of the request's spans, once its prompt is computed.
    """

    request_id: str
    api_key: str = field(default="", repr=False)
    timings_ms: dict[str, float] = field(default_factory=dict)
    arrived_s: float = field(default_factory=time.perf_counter)
    donor_keys: tuple[str, ...] = ()
    is_gone: bool = False
    _callbacks: list[Callable[[], None]] = field(default_factory=list)

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the client goes away, or at once if it has."""
        if self.is_gone:
            callback()
        else:
            self._callbacks.append(callback)

    def gone(self) -> None:
        """The client went away."""
        self.is_gone = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def server_timing(self) -> str:
        """The value of the header ``Server-Timing``; empty without times."""
        return ", ".join(f"{name};dur={value:.2f}" for name, value in self.timings_ms.items())


_current: ContextVar[Exchange | None] = ContextVar("vlcache_fx_exchange", default=None)


def current_exchange() -> Exchange:
    """The exchange that this task answers; an empty one outside of a server."""
    return _current.get() or Exchange("")


def begin_exchange(exchange: Exchange) -> None:
    """Make it the exchange of this task, and of the tasks that it starts."""
    _current.set(exchange)
