"""Messages of ASGI, between a server and an application."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive


def ends_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is the last one of an answer."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def until_gone(receive: Receive) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def replay(body: bytes, gone: asyncio.Event) -> Receive:
    """A request as an application receives it: a body that was read before, then the client's going away.

    Args:
        body: the whole body.
        gone: set when the client goes away.
    """
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


def mark_seen(done: asyncio.Future[Any]) -> None:
    """Mark the error of a future or task as seen, so that asyncio does not complain: a callback of it."""
    if not done.cancelled():
        done.exception()
