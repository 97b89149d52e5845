"""The entrance, with replicas that are a few lines each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'vlcache_fx[ray]'")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from vlcache_fx.serve.cluster import ingress
from vlcache_fx.serve.cluster.ingress import Ingress
from vlcache_fx.serve.cluster.replica import ACCEPTED
from vlcache_fx.serve.cluster.route import Route
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.pictures import picture_digests
from vlcache_fx.serve.request import tenant_of

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
}
JSON = [(b"content-type", b"application/json"), (b"x-request-id", b"r")]
EVENTS = [(b"content-type", b"text/event-stream")]


class Handle:
    """Ray's handle of replicas; ``answers`` are what the next requests get, in their order."""

    def __init__(self, *answers: Callable[[], AsyncIterator[Any]], healthy: int = 1) -> None:
        self.answers, self.healthy = list(answers), healthy
        self.calls: list[tuple[Route, dict[str, Any], bytes]] = []
        self.cancelled = 0

    def options(self, **given: Any) -> Handle:
        assert given == {"method_name": "answer", "stream": True}
        return self

    def remote(self, route: Route, scope: dict[str, Any], body: bytes) -> Messages:
        self.calls.append((route, scope, body))
        return Messages(self, self.answers.pop(0)())

    def running_replicas_populated(self) -> bool:
        return self.healthy > 0

    def broadcast(self, method: str) -> Any:
        results: list[Any] = [
            {"replica": f"r{index}", "models": {"m": "ready"}} if method == "health" else (f"r{index}", [])
            for index in range(self.healthy)
        ]
        return Results([*results, RuntimeError("a replica that does not answer")])


class Results:
    def __init__(self, results: list[Any]) -> None:
        self._results = results

    async def results_async(self, **given: Any) -> list[Any]:
        return self._results


class Messages:
    def __init__(self, handle: Handle, messages: AsyncIterator[Any]) -> None:
        self._handle, self._messages = handle, messages

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        self._handle.cancelled += 1


def start(headers: list[Any] = JSON) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def part(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def answering(*messages: Any, name: str = "r0") -> Callable[[], AsyncIterator[Any]]:
    """An answer: messages, or an error that is raised there."""

    async def answer() -> AsyncIterator[Any]:
        yield [{"type": ACCEPTED, "replica": name}]
        for message in messages:
            if isinstance(message, BaseException):
                raise message
            yield [message]

    return answer


WELL = answering(start(), part(b"{}"))


def died() -> ActorDiedError:
    return ActorDiedError()


def post(
    handle: Handle, body: Any = BODY, options: ServeOptions | None = None, **headers: str
) -> httpx2.Response:
    async def send() -> httpx2.Response:
        app: Any = Ingress(handle, options or ServeOptions(("m",))).app
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post("/v1/chat/completions", content=content, headers=headers)

    return asyncio.run(send())


def get(handle: Handle, path: str) -> httpx2.Response:
    async def send() -> httpx2.Response:
        app: Any = Ingress(handle, ServeOptions(("m",))).app
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as client:
            return await client.get(path)

    return asyncio.run(send())


def test_the_answer_is_the_replicas() -> None:
    handle = Handle(answering(start(), part(b'{"a"', more=True), part(b":1}")))
    answer = post(handle, **{"x-request-id": "mine"})
    assert (answer.status_code, answer.json()) == (200, {"a": 1})
    assert answer.headers["x-vlcache-replica"] == "r0"
    route, scope, body = handle.calls[0]
    assert route.pictures == picture_digests(body) != ()
    assert json.loads(body) == BODY
    assert (scope["path"], scope["method"]) == ("/v1/chat/completions", "POST")
    # Ray's proxy adds the name to the answer.
    assert "x-request-id" not in answer.headers
    assert (b"x-request-id", b"mine") in scope["headers"]


def test_tenants_are_routed_apart() -> None:
    handle = Handle(WELL, WELL)
    options = ServeOptions(("m",), api_keys=("alice", "bob"), salt_from_api_key=True)
    for key in ("alice", "bob"):
        assert post(handle, options=options, authorization=f"Bearer {key}").status_code == 200
    digests = [route.pictures for route, _, _ in handle.calls]
    assert digests == [picture_digests(json.dumps(BODY).encode(), tenant_of(key)) for key in ("alice", "bob")]


def test_wrong_keys_and_large_bodies_reach_no_replica() -> None:
    handle = Handle()
    options = ServeOptions(("m",), api_keys=("alice",), max_body_bytes=400)
    assert post(handle, options=options).status_code == 401
    assert post(handle, b"x" * 401, options, authorization="Bearer alice").status_code == 413
    assert handle.calls == []


def test_another_replica_begins_anew_where_one_died() -> None:
    handle = Handle(answering(died(), name="r0"), answering(start(), part(b"{}"), name="r1"))
    answer = post(handle)
    assert (answer.status_code, answer.headers["x-vlcache-replica"]) == (200, "r1")
    assert [route.avoid for route, _, _ in handle.calls] == [(), ("r0",)]
    assert handle.calls[0][2] == handle.calls[1][2]


def test_it_gives_up_after_the_second() -> None:
    handle = Handle(answering(died()), answering(died()))
    answer = post(handle)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_error")


def test_a_stream_that_breaks_off_says_so() -> None:
    handle = Handle(answering(start(EVENTS), part(b"data: 1\n\n", more=True), died()))
    events = post(handle).text.split("\n\n")
    assert events[0] == "data: 1"
    assert json.loads(events[1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert events[2:] == [""]


def test_an_answer_that_breaks_off_is_cut() -> None:
    handle = Handle(answering(start(), part(b"{", more=True), died()))
    with pytest.raises(ConnectionError, match="died"):
        post(handle)
    assert len(handle.calls) == 1


def test_a_replica_that_dies_after_its_answer_spoils_nothing() -> None:
    assert post(Handle(answering(start(), part(b"{}"), died()))).json() == {}


def test_without_a_replica_clients_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield []

    monkeypatch.setattr(ingress, "ACCEPT_S", 0.01)
    answer = post(Handle(never))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "5"


def test_no_deployment_is_not_ready_either() -> None:
    async def gone() -> AsyncIterator[Any]:
        raise DeploymentUnavailableError("m")
        yield []

    assert post(Handle(gone, gone)).status_code == 503


def test_a_client_that_goes_away_ends_the_request() -> None:
    async def run() -> Handle:
        async def slow() -> AsyncIterator[Any]:
            yield [{"type": ACCEPTED, "replica": "r0"}]
            await asyncio.sleep(60)

        handle = Handle(slow)
        sent = iter(
            [
                {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False},
                {"type": "http.disconnect"},
            ]
        )

        async def receive() -> Any:
            return next(sent)

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await Ingress(handle, ServeOptions(("m",))).app(scope, receive, send)
        return handle

    assert asyncio.run(run()).cancelled == 1


@pytest.mark.parametrize(("healthy", "status", "text"), [(2, 200, "ok"), (0, 503, "starting")])
def test_health_is_that_of_the_replicas(healthy: int, status: int, text: str) -> None:
    answer = get(Handle(healthy=healthy), "/health")
    assert (answer.status_code, answer.json()["status"]) == (status, text)
    assert len(answer.json()["replicas"]) == healthy


def test_live_and_metrics_need_no_replica() -> None:
    assert get(Handle(healthy=0), "/live").json() == {"status": "ok"}
    assert "vlcache_cluster_retries_total" in get(Handle(healthy=0), "/metrics").text


def test_other_paths_are_the_replicas_to_refuse() -> None:
    handle = Handle(WELL)
    assert get(handle, "/nothing").status_code == 200
    assert handle.calls[0][1]["path"] == "/nothing"


def test_the_application_starts_and_stops() -> None:
    async def run() -> list[str]:
        kinds = iter(["lifespan.startup", "lifespan.shutdown"])
        sent: list[str] = []

        async def receive() -> Any:
            return {"type": next(kinds)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await Ingress(Handle(), ServeOptions(("m",))).app({"type": "lifespan"}, receive, send)
        return sent

    assert asyncio.run(run()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
