"""Ray's side of the choice of a replica, with replicas that are no actors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'vlcache_fx[ray]'")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from vlcache_fx.serve.cluster.route import Route
from vlcache_fx.serve.cluster.router import PictureRouter

DEPLOYMENT = DeploymentID(name="replicas", app_name="app")


class FakeReplica:
    """What a router asks of a replica."""

    max_ongoing_requests = 4

    def __init__(
        self, name: str, queue: int = 0, pictures: list[str] | None = None, delay_s: float = 0.0
    ) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.queue, self.delay_s = queue, delay_s
        self.routing_stats: Mapping[str, Any] = {} if pictures is None else {"pictures": pictures}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self.delay_s)
        return self.queue


def request(*pictures: str, avoid: tuple[str, ...] = ()) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id="i")
    return PendingRequest(args=[Route(pictures, avoid)], kwargs={}, metadata=metadata)


def router(*replicas: FakeReplica, imbalance: int = 1) -> PictureRouter:
    found = PictureRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    found.initialize_state(imbalance=imbalance)
    found.update_replicas(list(replicas))
    return found


async def chosen(found: PictureRouter, pending: PendingRequest | None) -> list[str]:
    ranks = await found.choose_replicas(list(found.curr_replicas.values()), pending)
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


def test_reports_and_queues_decide() -> None:
    async def run() -> None:
        found = router(FakeReplica("a", queue=1, pictures=["p"]), FakeReplica("b", pictures=[]))
        assert await chosen(found, request("p")) == ["a", "b"]
        assert await chosen(found, request("q")) == ["b", "a"]
        assert await chosen(found, request("p", avoid=("a",))) == ["b", "a"]
        assert await chosen(found, None) == ["b", "a"]

    asyncio.run(run())


def test_a_replica_that_answers_late_keeps_its_queue() -> None:
    """One that runs a model may take longer than the 0.1 s that Ray gives by itself."""

    async def run() -> None:
        found = router(FakeReplica("a", queue=3, delay_s=0.3), FakeReplica("b", queue=1))
        assert await chosen(found, request("p")) == ["b", "a"]

    asyncio.run(run())


def test_requests_for_a_new_picture_meet() -> None:
    """Also before the first one was accepted."""

    async def run() -> None:
        found = router(FakeReplica("a"), FakeReplica("b"))
        for name in ("p", "q", "r", "s"):
            first = await chosen(found, request(name))
            assert await chosen(found, request(name)) == first

    asyncio.run(run())


def test_a_busy_replica_is_passed_over() -> None:
    async def run() -> None:
        found = router(FakeReplica("a", queue=3, pictures=["p"]), FakeReplica("b", queue=1))
        assert await chosen(found, request("p")) == ["b", "a"]

    asyncio.run(run())


def test_a_replica_that_is_gone_is_not_chosen() -> None:
    async def run() -> None:
        a, b = FakeReplica("a", pictures=["p"]), FakeReplica("b")
        found = router(a, b)
        found.update_replicas([b])
        assert await chosen(found, request("p")) == ["b"]
        found.on_request_routed(request("q"), b.replica_id, None)  # type: ignore[arg-type]
        found.update_replicas([a, b])
        assert (await chosen(found, request("q")))[0] == "b"

    asyncio.run(run())


def test_trying_again_waits() -> None:
    """Ray would otherwise ask again at once, as long as all are full."""

    async def run() -> None:
        pending = request("p")
        await chosen(router(FakeReplica("a")), pending)
        assert pending.routing_context.should_backoff

    asyncio.run(run())
