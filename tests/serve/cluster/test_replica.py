"""A replica's part in an answer, with applications of a few lines."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import StreamingResponse

from vlcache_fx.serve.cluster.held import HeldPictures
from vlcache_fx.serve.cluster.replica import ACCEPTED, Replica
from vlcache_fx.serve.cluster.route import Route
from vlcache_fx.serve.exchange import SCOPE_ENTRY, Exchange
from vlcache_fx.store.memory import MemoryStore

SCOPE = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [[b"a", b"b"]]}


def replica(app: Any, **models: Any) -> Replica:
    """A replica without models: the constructor would load them."""
    found: Replica = Replica.__new__(Replica)
    found.name = "r1"
    found._service = SimpleNamespace(  # type: ignore[assignment]
        app=app, models=SimpleNamespace(**models), state=SimpleNamespace(is_alive=True)
    )
    found._held = HeldPictures()
    found._tasks = set()
    return found


async def ask(found: Replica, body: bytes = b"", route: Route | None = None) -> list[Any]:
    parts = [part async for part in found.answer(route or Route(), dict(SCOPE), body)]
    return [message for part in parts for message in part]


def test_an_answer_names_the_replica_and_passes_all_messages_on() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["headers"] == [(b"a", b"b")]
        body = (await receive())["body"]
        await StreamingResponse(iter([body, body]))(scope, receive, send)

    messages = asyncio.run(ask(replica(app), b"hello"))
    assert messages[0] == {"type": ACCEPTED, "replica": "r1"}
    assert messages[1]["status"] == 200
    assert b"".join(message.get("body", b"") for message in messages[2:]) == b"hellohello"
    assert messages[-1]["more_body"] is False


def test_a_client_that_goes_away_is_seen() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((await receive())["type"])

    async def run() -> None:
        found = replica(app)
        answer = found.answer(Route(), dict(SCOPE), b"")
        async for messages in answer:
            if messages[0]["type"] == "http.response.start":
                break
        await answer.aclose()  # type: ignore[attr-defined]
        await asyncio.gather(*found._tasks)

    asyncio.run(run())
    assert seen == ["http.disconnect"]


def test_a_failure_of_the_application_is_the_answers() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(ask(replica(app)))


def test_it_reports_pictures_whose_donors_it_has() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[SCOPE_ENTRY] = Exchange("x", donor_keys=("kp", "kq"))

    async def run() -> Any:
        store = MemoryStore(1024)
        import torch

        from vlcache_fx.store.entry import Entry

        store.put("kq", Entry({"k": torch.zeros(4)}, {}))
        found = replica(app, engines={"m": SimpleNamespace(store=store)})
        await ask(found, route=Route(("p", "q")))
        return await found.record_routing_stats()

    assert asyncio.run(run()) == {"pictures": ["q"]}


def test_it_is_not_well_without_its_models() -> None:
    async def run(is_ready: bool) -> None:
        found = replica(None, is_ready=is_ready, states=lambda: {"m": "loading"})
        await found.check_health()

    asyncio.run(run(True))
    with pytest.raises(RuntimeError, match=r"replica r1 cannot answer: .*loading"):
        asyncio.run(run(False))


def test_an_error_behind_a_complete_answer_is_no_failure() -> None:
    """After an answer of status 500, starlette raises what caused it, for servers to log."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        raise ValueError("no")

    messages = asyncio.run(ask(replica(app)))
    assert [message.get("status") for message in messages] == [None, 500, None]
