"""Lists what a Mooncake master knows, through its HTTP server."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

from vlcache_fx.errors import StoreError

LARGEST_ANSWER_BYTES = 256 << 20
TIMEOUT_S = 5.0


def names_of(host: str, port: int) -> Iterator[str]:
    """Yield the names of all values.

    Raises:
        StoreError: the server does not answer.
    """
    yield from filter(None, _get(host, port, "/get_all_keys").decode(errors="replace").split("\n"))


def _get(host: str, port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection(host.strip("[]"), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().read(LARGEST_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise StoreError(f"the master's HTTP server at {host}:{port} does not answer: {error}") from error
    finally:
        connection.close()
