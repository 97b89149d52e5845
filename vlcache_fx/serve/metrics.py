"""What a server counts, for Prometheus, beside the metrics of its engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import PlainTextResponse

from vlcache_fx.integrations.metrics import register

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlcache_fx.runtime.engine import ServingEngine
    from vlcache_fx.serve.job import Job

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class ServeMetrics:
    """Counters of one server, with a registry of their own. Safe in threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vlcache_serve_requests",
            "requests, by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self._waiting = Gauge(
            "vlcache_serve_waiting", "requests that wait", ["model"], registry=self.registry
        )
        self._running = Gauge("vlcache_serve_running", "requests that run", ["model"], registry=self.registry)
        self._sizes = Histogram(
            "vlcache_serve_batch_size",
            "requests that ran together",
            ["model"],
            buckets=SIZES,
            registry=self.registry,
        )
        self._queued = self._seconds("queue_seconds", "time that requests waited")
        self._first = self._seconds(
            "time_to_first_token_seconds", "from a request's arrival to its first token"
        )
        self._whole = self._seconds("request_seconds", "from a request's arrival to its last token")
        self._tokens = Counter(
            "vlcache_serve_tokens",
            "tokens of prompts, those of them that were reused, and tokens of answers",
            ["model", "kind"],
            registry=self.registry,
        )

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"vlcache_serve_{name}", text, ["model"], buckets=SECONDS, registry=self.registry)

    def add_engine(self, name: str, engine: ServingEngine) -> None:
        """Export the numbers of an engine too, with the label ``model``."""
        register(engine, self.registry, model=name)

    def saw_response(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def show_load(self, model: str, waiting: int, running: int) -> None:
        """Set how many requests wait and run."""
        self._waiting.labels(model).set(waiting)
        self._running.labels(model).set(running)

    def saw_batch(self, model: str, jobs: Sequence[Job]) -> None:
        """Count a batch; examples are none."""
        if not jobs[0].is_example:
            self._sizes.labels(model).observe(len(jobs))

    def saw_answer(self, model: str, job: Job) -> None:
        """Count an answer that is complete; examples are none."""
        if job.is_cancelled or job.is_example or not job.first_token_s:
            return
        self._queued.labels(model).observe(job.started_s - job.created_s)
        self._first.labels(model).observe(job.first_token_s - job.arrived_s)
        self._whole.labels(model).observe(job.ended_s - job.arrived_s)
        counts = {"prompt": job.prompt_tokens, "cached": job.cached_tokens, "answer": job.row.total_tokens}
        for kind, count in counts.items():
            self._tokens.labels(model, kind).inc(count)

    def text(self) -> str:
        """All numbers, as Prometheus reads them."""
        return generate_latest(self.registry).decode()


def metrics_response(text: str) -> PlainTextResponse:
    """The response with numbers as Prometheus reads them."""
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")
