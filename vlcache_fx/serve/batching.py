"""Runs the requests of one model, several at a time, in a thread of its own."""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

from vlcache_fx.runtime.donors.recent_keys import RecentKeys
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.serve.batch import choose
from vlcache_fx.serve.errors import CLIENT_GONE, RequestError
from vlcache_fx.serve.generation import generate
from vlcache_fx.serve.job import Job
from vlcache_fx.serve.metrics import ServeMetrics

log = logging.getLogger("vlcache_fx.serve")

NEW_SHARE = 0.25
"""Weight of the latest batch in the moving average of seconds per request."""
LONGEST_RETRY_S = 120
MAX_PICTURES = 16384
"""Pictures that a batcher remembers."""


class Batcher:
    """The queue of one model, and the thread that takes from it.

    Args:
        name: name of the model.
        model: the compiled model.
        batch_size: largest number of requests that run together.
        batch_tokens: largest number of tokens that they compute before their first answers, with padding.
        batch_wait_ms: longest time that the oldest request waits for others.
        max_waiting: largest number of requests that wait.
        sampling: held while random numbers are drawn. All models share torch's generator, and a seed must
            give the same answer while others run.
        metrics: counters.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        batch_size: int,
        batch_tokens: int,
        batch_wait_ms: float,
        max_waiting: int,
        sampling: threading.Lock,
        metrics: ServeMetrics,
    ) -> None:
        self._name, self._model = name, model
        self._batch_tokens, self._seen = batch_tokens, RecentKeys(MAX_PICTURES)
        self._batch_size, self._batch_wait_s, self._max_waiting = batch_size, batch_wait_ms / 1e3, max_waiting
        self._sampling, self._metrics = sampling, metrics
        self._pace = Pace(NEW_SHARE)
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_stopped = False
        # In a copy of this context: settings of Inductor that the server made hold there, too.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(
            target=run, args=(self._run,), name=f"vlcache-serve-{name}", daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, *jobs: Job) -> None:
        """Add jobs to the queue, all at once.

        Raises:
            RequestError: 429 if too many wait, 503 if the server stops.
        """
        with self._changed:
            self._check_room(len(jobs))
            self._waiting.extend(jobs)
            self._show_counts()
            self._changed.notify_all()

    def check_room(self) -> None:
        """Check that a request could be submitted now; raises as ``submit`` does."""
        with self._changed:
            self._check_room(1)

    def _check_room(self, count: int) -> None:
        if self._is_stopped:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        if len(self._waiting) + count > self._max_waiting:
            raise RequestError(
                429,
                f"{len(self._waiting)} requests wait for this model already: try again later",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            )

    def cancel(self, job: Job) -> None:
        """The client is gone: take the job from the queue, or end its row."""
        with self._changed:
            if job.ended_s:  # the client has its answer, which may not be counted yet
                return
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._show_counts()
        job.fail(RequestError(CLIENT_GONE, "the client went away"))

    def stop(self, timeout_s: float) -> None:
        """Refuse what waits, end what runs, and wait for the thread."""
        error = RequestError(503, "the server is shutting down", code="shutting_down")
        with self._changed:
            self._is_stopped = True
            refused, running = self._waiting, list(self._running)
            self._waiting = []
            for job in (*refused, *running):
                job.is_cancelled = True
            self._changed.notify_all()
        for job in (*refused, *running):
            job.fail(error)
        self._thread.join(timeout_s)

    def _retry_after_s(self) -> int:
        wait_s = self._pace.seconds(len(self._waiting)) or 1.0
        return min(LONGEST_RETRY_S, max(1, math.ceil(wait_s)))

    def _show_counts(self) -> None:
        self._metrics.show_load(self._name, len(self._waiting), len(self._running))

    def _run(self) -> None:
        while True:
            jobs = self._next_batch()
            if jobs is None:
                return
            begin = time.perf_counter()
            try:
                self._serve(jobs)
            finally:
                with self._changed:
                    if not jobs[0].is_example:  # they wait for compilations
                        self._pace.add(len(jobs), time.perf_counter() - begin)
                    self._running = []
                    self._show_counts()
            del jobs  # its tensors must not live until the next request

    def _next_batch(self) -> list[Job] | None:
        """Wait for requests; return those that run together, or None at the end."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._is_stopped:
                        return None
                    self._changed.wait()
                first = self._waiting[0]
                found = choose(self._waiting, self._batch_size, self._batch_tokens, self._seen)
                left_s = first.created_s + self._batch_wait_s - time.perf_counter()
                if len(found) >= self._batch_size or first.group is None or left_s <= 0:
                    break
                self._changed.wait(left_s)
            self._waiting = [job for job in self._waiting if job not in found]
            self._running = found
            self._show_counts()
            return found

    def _serve(self, jobs: Sequence[Job]) -> None:
        try:
            self._generate(jobs)
        except Exception:
            log.exception("the model %s failed on a batch of %d", self._name, len(jobs))
            for job in jobs:
                self._serve_alone(job, was_alone=len(jobs) == 1)

    def _serve_alone(self, job: Job, *, was_alone: bool) -> None:
        """Run a job of a failed batch again, by itself: one bad request must not fail the others."""
        failure = RequestError(500, "the model failed on this request", code="model_failed")
        if was_alone or job.row.token_ids or job.is_done:
            job.fail(failure)
            return
        try:
            self._generate([job])
        except Exception:
            log.exception("the model %s failed on a request", self._name)
            job.fail(failure)

    def _generate(self, jobs: Sequence[Job]) -> None:
        self._metrics.saw_batch(self._name, jobs)
        generate(self._model, jobs, self._sampling)
        for job in jobs:
            self._metrics.saw_answer(self._name, job)
            if job.leaves_donors:
                for picture in job.pictures:
                    self._seen.add(picture)
