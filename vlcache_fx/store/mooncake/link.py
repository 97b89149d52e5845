"""The connection to a master over time: after a failure it rests, and is made anew in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from vlcache_fx.errors import StoreError
from vlcache_fx.store.mooncake.client import MooncakeClient

log = logging.getLogger("vlcache_fx")

FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0


class MooncakeLink:
    """Holds the client that works, if any (a circuit breaker).

    A rest takes ``first_rest_s``, and twice as long after each failure in a row, to ``LONGEST_REST_S``.

    Args:
        connect: makes a client, or raises ``StoreError``.
        name: of the store, for messages.
        first_rest_s: seconds.

    Raises:
        StoreError: the first client cannot be made.
    """

    def __init__(
        self, connect: Callable[[], MooncakeClient], name: str, first_rest_s: float = FIRST_REST_S
    ) -> None:
        self._connect, self._name = connect, name
        self._first_rest_s = self._rest_s = first_rest_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._client: MooncakeClient | None = connect()

    def client(self) -> MooncakeClient | None:
        """Return the client; None while the tier rests."""
        return self._client

    def succeeded(self) -> None:
        """Note that a call succeeded: the next rest is short again."""
        self._rest_s = self._first_rest_s

    def failed(self, client: MooncakeClient, reason: str) -> None:
        """Give up a client and begin a rest. Logs once per rest; other calls of the client fail too."""
        with self._lock:
            if self._client is not client:
                return
            self._client = None
            rest_s = self._take_rest()
        log.warning(
            "vlcache: %s failed, going on without it for %g s or longer: %s", self._name, rest_s, reason
        )
        worker = threading.Thread(
            target=self._replace, args=(client, rest_s), name="vlcache-mooncake-rest", daemon=True
        )
        worker.start()

    def close(self) -> None:
        """End the client, for good."""
        self._closing.set()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _take_rest(self) -> float:
        rest_s = self._rest_s
        self._rest_s = min(2 * rest_s, LONGEST_REST_S)
        return rest_s

    def _replace(self, old: MooncakeClient, rest_s: float) -> None:
        old.close()
        while not self._closing.wait(rest_s):
            try:
                client = self._connect()
            except StoreError as error:
                log.debug("vlcache: %s still fails: %s", self._name, error)
                rest_s = self._take_rest()
                continue
            with self._lock:
                if not self._closing.is_set():
                    self._client = client
                    log.info("vlcache: %s is back", self._name)
                    return
            client.close()
