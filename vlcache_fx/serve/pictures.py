"""The pictures that a request shows, as digests: what replicas and batches are chosen by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

DIGEST_BYTES = 16


def picture_digests(body: bytes, tenant: str = "") -> tuple[str, ...]:
    """Return a digest of each picture of a request, in its order.

    Equal pictures of equal models, tenants and salts have equal digests, if they come as equal URLs. Only
    the choice of a replica or a batch depends on them: the keys of donors are made where the model is.

    Args:
        body: the body of a chat completion or a response; may be malformed.
        tenant: the tenant's salt; empty without tenants.

    Returns:
        Digests in hexadecimal, each once. Empty for a request without pictures, one that reuses nothing, and
        for a body that is not understood.
    """
    if b"image" not in body:
        return ()
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    return digests_of(request, tenant) if isinstance(request, Mapping) else ()


def digests_of(request: Mapping[str, Any], tenant: str = "") -> tuple[str, ...]:
    """The same of a request that is parsed; ``tenant`` may be any salt."""
    settings = request.get("vlcache")
    settings = settings if isinstance(settings, Mapping) else {}
    if settings.get("bypass"):
        return ()
    root = json.dumps([tenant, str(request.get("model")), str(settings.get("salt", ""))]).encode()
    return tuple(dict.fromkeys(_digest(root, url) for url in _urls(request)))


def _digest(root: bytes, url: str) -> str:
    # Strings of JSON may hold halves of characters, which have no encoding of their own.
    data = url.encode("utf-8", "surrogatepass")
    return blake3(root + b"\0" + data).hexdigest(length=DIGEST_BYTES)


def _urls(request: Mapping[str, Any]) -> Iterator[str]:
    for message in _items(request.get("messages")) or _items(request.get("input")):
        for part in _items(message.get("content")):
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if isinstance(url, str):
                yield url


def _items(value: object) -> Sequence[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
