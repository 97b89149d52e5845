"""Loads a file from a host that an option allows."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import Any

from vlcache_fx.serve.errors import RequestError, bad_request

CHUNK_BYTES = 64 * 1024
PARAM = "image_url"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead anywhere, past the list of hosts."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none: the status of the redirect is the answer."""


def fetch(url: str, max_bytes: int, timeout_s: float) -> bytes:
    """Return the bytes at an http(s) URL whose host has been checked. Without proxies, redirects or cookies.

    Args:
        url: the URL.
        max_bytes: no more than one byte above this is read.
        timeout_s: limit for all of it.

    Raises:
        RequestError: 400, the host does not answer with the file in time.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    deadline = time.monotonic() + timeout_s
    parts: list[bytes] = []
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vlcache"})  # noqa: S310 - checked by the caller
        with opener.open(request, timeout=timeout_s) as response:
            left = max_bytes + 1
            while left > 0 and (chunk := response.read1(min(CHUNK_BYTES, left))):
                parts.append(chunk)
                left -= len(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        raise _failed(f"its host answered with status {error.code}") from None
    except (OSError, ValueError, EOFError) as error:
        is_late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
        raise _failed("its host took too long" if is_late else "its host does not answer") from None
    except Exception as error:  # noqa: BLE001 - http.client has errors of its own
        raise _failed(f"its host does not speak HTTP ({type(error).__name__})") from None
    return b"".join(parts)


def _failed(why: str) -> RequestError:
    return bad_request(f"a picture cannot be loaded: {why}", PARAM)
