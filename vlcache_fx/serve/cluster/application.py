"""The application that Ray Serve runs: an entrance, and replicas behind it."""

from __future__ import annotations

import os
from typing import Any

from vlcache_fx.log_output import VARIABLE
from vlcache_fx.serve.cluster.options import ClusterOptions
from vlcache_fx.serve.options import ServeOptions

REPLICAS, ENTRANCE = "vlcache-replica", "vlcache-entrance"
"""Names of the deployments."""
CONSTRUCTIONS = 3
"""How often Ray tries to start a replica before it gives up."""
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
"""A replica that compiles may be slow to say that it is well."""


def build_application(
    options: ServeOptions, cluster: ClusterOptions, *, threads: int, gpus_per_replica: float
) -> Any:
    """Return the application, for ``ray.serve.run``.

    Args:
        options: what each replica serves.
        cluster: how many replicas, and what each gets.
        threads: threads of torch in each replica.
        gpus_per_replica: GPUs of each replica.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from vlcache_fx.serve.cluster import router
    from vlcache_fx.serve.cluster.replica import Replica

    # Replicas refuse what is too much for them, with 429; Ray's own bound is never reached before.
    most = len(options.models) * (options.batch_size + options.max_waiting) + options.batch_size
    imbalance = max(1, options.batch_size // 2) if cluster.imbalance is None else cluster.imbalance
    scaling: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": cluster.replicas,
                "max_replicas": cluster.max_replicas,
                "target_ongoing_requests": float(options.batch_size),
            }
        }
    replicas: Any = serve.deployment(
        Replica,
        name=REPLICAS,
        max_ongoing_requests=most,
        max_queued_requests=options.max_waiting * cluster.most_replicas,
        max_constructor_retry_count=CONSTRUCTIONS,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=options.shutdown_timeout_s + 10,
        ray_actor_options=replica_actor_options(cluster, gpus_per_replica),
        request_router_config=RequestRouterConfig(
            request_router_class=f"{router.__name__}:{router.PictureRouter.__name__}",
            request_router_kwargs={"imbalance": imbalance},
            request_routing_stats_period_s=router.REPORT_S,
        ),
        **scaling,
    )
    entrance: Any = serve.deployment(
        serve.ingress()(_Entrance),
        name=ENTRANCE,
        num_replicas=1,
        max_ongoing_requests=4 * most * cluster.most_replicas,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=options.shutdown_timeout_s,
        ray_actor_options={"num_cpus": 0},
    )
    return entrance.bind(replicas.bind(options, threads), options)


def replica_actor_options(cluster: ClusterOptions, gpus_per_replica: float) -> dict[str, Any]:
    """Return Ray's options for the processes of replicas: what each gets, and ``VLCACHE_LOG`` of this one.

    A process on a machine of a running cluster has the environment of that cluster, not of this process.
    """
    level = os.environ.get(VARIABLE)
    found: dict[str, Any] = {"num_cpus": cluster.cpus_per_replica, "num_gpus": gpus_per_replica}
    return found if level is None else found | {"runtime_env": {"env_vars": {VARIABLE: level}}}


class _Entrance:
    """The deployment of the ingress."""

    def __init__(self, handle: Any, options: ServeOptions) -> None:
        self._handle, self._options = handle, options

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; called by Ray."""
        from vlcache_fx.serve.cluster.ingress import Ingress

        return Ingress(self._handle, self._options).app
