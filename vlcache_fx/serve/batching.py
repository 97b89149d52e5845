"""Runs the requests of one model, several at a time, in a thread of its own."""

from __future__ import annotations

import contextvars
import copy
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vlcache_fx.runtime.pace import Pace
from vlcache_fx.serve.collate import collate
from vlcache_fx.serve.errors import CLIENT_GONE, RequestError
from vlcache_fx.serve.job import Job
from vlcache_fx.serve.metrics import ServeMetrics

log = logging.getLogger("vlcache_fx.serve")

NEW_SHARE = 0.25
"""Weight of the latest batch in the moving average of seconds per request."""
LONGEST_RETRY_S = 120


class Batcher:
    """The queue of one model, and the thread that takes from it.

    Args:
        name: name of the model.
        model: the compiled model.
        batch_size: largest number of requests that run together.
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
        batch_wait_ms: float,
        max_waiting: int,
        sampling: threading.Lock,
        metrics: ServeMetrics,
    ) -> None:
        self._name, self._model = name, model
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
            if self._is_stopped:
                raise RequestError(503, "the server is shutting down", code="shutting_down")
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise RequestError(
                    429,
                    f"{len(self._waiting)} requests wait for this model already: try again later",
                    code="queue_full",
                    retry_after_s=self._retry_after_s(),
                )
            self._waiting.extend(jobs)
            self._show_counts()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """The client is gone: take the job from the queue, or end its row."""
        with self._changed:
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
                found = [job for job in self._waiting if _fits(first, job)][: self._batch_size]
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
        for job in jobs:
            job.start(len(jobs))
        engine = self._model.vlcache
        first = jobs[0]
        config = _config_of(jobs)
        inputs = collate([job.inputs for job in jobs], _pad_token_id(config))
        settings = first.settings.with_own_salt() if first.settings.bypass else first.settings
        more = {"generation_mode": "text"} if hasattr(self._model, "has_talker") else {}
        self._metrics.saw_batch(self._name, len(jobs))
        try:
            with settings.using(engine), engine.reports() as reports, _random(first, self._sampling):
                rows = _Rows(jobs, reports)
                self._model.generate(
                    **inputs, **more, generation_config=config, stopping_criteria=StoppingCriteriaList([rows])
                )
        finally:
            if settings.bypass and settings.salt is not None:
                engine.clear(salt=settings.salt)
        for job in jobs:
            job.end()  # those that the model itself ended, such as at its longest length
            self._metrics.saw_answer(self._name, job)


class _Rows(StoppingCriteria):
    """Hands each row's token to its job, and ends the rows that are done."""

    def __init__(self, jobs: Sequence[Job], reports: Sequence[Any]) -> None:
        self._jobs, self._reports = jobs, reports
        self._is_first = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        if self._is_first:
            self._is_first = False
            self._share_report()
        for job, token_id in zip(self._jobs, input_ids[:, -1].tolist(), strict=True):
            if not job.is_done:
                job.take(token_id)
        return torch.tensor([job.is_done for job in self._jobs], device=input_ids.device)

    def _share_report(self) -> None:
        """Give each job its part of the prefill's report: the only call so far."""
        if self._reports:
            report = self._reports[-1]
            for index, job in enumerate(self._jobs):
                job.report = report.of_sample(index)


class _random:  # noqa: N801 - a context manager
    """Holds the lock where random numbers are drawn, and sets the seed of a request that has one."""

    def __init__(self, job: Job, lock: threading.Lock) -> None:
        self._job, self._lock = job, lock

    def __enter__(self) -> None:
        self._is_needed = bool(self._job.config.do_sample)
        if self._is_needed:
            self._lock.acquire()
            if self._job.seed is not None:
                torch.manual_seed(self._job.seed)

    def __exit__(self, *_: object) -> None:
        if self._is_needed:
            self._lock.release()


def _fits(first: Job, job: Job) -> bool:
    return job is first or (first.group is not None and job.group == first.group)


def _config_of(jobs: Sequence[Job]) -> GenerationConfig:
    """One configuration for jobs of a group: the longest of their answers. Rows end by themselves."""
    config = copy.deepcopy(jobs[0].config)
    config.max_new_tokens = max(job.config.max_new_tokens for job in jobs)
    if config.pad_token_id is None:
        config.pad_token_id = _pad_token_id(config)
    return config


def _pad_token_id(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    return int(eos[0] if isinstance(eos, list) else eos or 0)
