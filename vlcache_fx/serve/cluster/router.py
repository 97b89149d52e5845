"""The request router that Ray Serve runs beside each handle of the replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from vlcache_fx.serve.cluster.affinity import Affinity
from vlcache_fx.serve.cluster.route import Route

REPORT_S = 2.0
"""Period of the replicas' reports."""
TRUST_S = 30.0
"""How long a replica is believed to have a picture that it was sent: reports travel by the controller."""


class PictureRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Sends a request to a replica that has its pictures in memory, or else to the least busy one.

    The first argument of a request is a ``Route``; requests without one go to the least busy replica.

    Attributes:
        queue_len_response_deadline_s: how long a replica may take to say how many requests it has, before the
            request goes elsewhere. Ray's 0.1 s is too short for one that traces or runs a model; a dead one
            is known at once.
    """

    queue_len_response_deadline_s = 1.0

    def initialize_state(self, imbalance: int = 1) -> None:
        """Take the arguments of the deployment's configuration; called once by Ray."""
        self._affinity = Affinity(imbalance, TRUST_S)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas changed, or what they say; called by Ray."""
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id: replica for replica in replicas}
        self._affinity.retain(names)
        for name, replica in names.items():
            stats: Mapping[str, Any] = replica.routing_stats or {}
            if "pictures" in stats:
                self._affinity.reported(name, stats["pictures"])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas for a request in ranks of one, best first."""
        if pending_request is not None:
            # All replicas are in the ranks: if none takes the request, trying again at once will not help.
            pending_request.routing_context.should_backoff = True
        route = _route_of(pending_request)
        queues = await self._queues(candidate_replicas)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranked = self._affinity.rank(route.pictures, queues, route.avoid)
        if ranked:
            # At once, not when the replica has accepted: requests that come meanwhile must meet there.
            self._affinity.sent(route.pictures, ranked[0])
        return [[by_name[name]] for name in ranked]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: ReplicaResult,
    ) -> None:
        """A replica accepted a request; it may be another one than the best. Called by Ray."""
        super().on_request_routed(pending_request, replica_id, result)
        self._affinity.sent(_route_of(pending_request).pictures, replica_id.unique_id)

    async def _queues(self, replicas: list[RunningReplica]) -> dict[str, int]:
        """How many requests each replica has; 0 where it does not say in time."""
        found = {
            replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) for replica in replicas
        }
        unknown = [replica for replica in replicas if found[replica.replica_id] is None]
        if unknown and len(replicas) > 1:
            for replica, length in await self._probe_queue_lens(unknown, 0):
                found[replica.replica_id] = length
        return {replica_id.unique_id: length or 0 for replica_id, length in found.items()}


def _route_of(request: PendingRequest | None) -> Route:
    if request is not None and request.args and isinstance(request.args[0], Route):
        return request.args[0]
    return Route()
