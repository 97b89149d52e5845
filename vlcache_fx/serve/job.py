"""A request that waits or runs."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from vlcache_fx.runtime.usage import reused_tokens
from vlcache_fx.serve.asgi import mark_seen
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.request import RequestSettings
from vlcache_fx.serve.row import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

    from vlcache_fx.runtime.report import ReportView


@dataclass(eq=False)
class Job:
    """One prompt, and what becomes of it. Written by the thread that generates, read by the event loop.

    Attributes:
        inputs: what the processor made of the prompt, for a batch of one.
        config: how to generate.
        settings: how to reuse donors.
        group: jobs with equal groups may run together; None to run alone.
        row: takes the answer.
        loop: the event loop that waits.
        seed: seed of the random numbers, or None.
        pictures: digests of the prompt's pictures, each once.
        report: the engine's report of the prefill, of this prompt alone; None before, or without one.
        batch_size: with how many prompts it ran, itself included.
        is_example: nobody asked for it: it compiles programs, and is in no metric.
        arrived_s: when the request came, before its pictures were processed.
        created_s, started_s, first_token_s, ended_s: times of ``time.perf_counter``; 0.0 before.
    """

    inputs: Mapping[str, Tensor]
    config: GenerationConfig
    settings: RequestSettings
    group: Hashable
    row: Row
    loop: asyncio.AbstractEventLoop
    seed: int | None = None
    pictures: tuple[str, ...] = ()
    report: ReportView | None = None
    batch_size: int = 0
    is_example: bool = False
    is_cancelled: bool = False
    arrived_s: float = field(default_factory=time.perf_counter)
    created_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self.began: asyncio.Future[None] = self.loop.create_future()
        """Done with the first token; fails if there is none."""
        self.finished: asyncio.Future[None] = self.loop.create_future()
        """Done with the last token; fails if the answer is not complete."""
        for future in (self.began, self.finished):
            future.add_done_callback(mark_seen)  # not every job has someone who waits for both

    @property
    def is_done(self) -> bool:
        """Whether it takes no more tokens."""
        return self.is_cancelled or self.ended_s > 0.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.inputs["input_ids"].shape[-1])

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose rows were reused."""
        if self.report is None:
            return 0
        # A view has the attributes of a report.
        return min(reused_tokens(self.report).reused, self.prompt_tokens)  # type: ignore[arg-type]

    @property
    def donor_keys(self) -> tuple[str, ...]:
        """The keys of the donors of its spans; empty before the prefill."""
        return () if self.report is None else tuple(span["key"] for span in self.report["spans"])

    @property
    def leaves_donors(self) -> bool:
        """Whether donors of all its pictures are stored. A new picture behind a reused one has none yet."""
        if self.report is None or self.settings.bypass:
            return False
        return self.report["mode"] == "cold" or all(span["hit"] for span in self.report["spans"])

    def start(self, batch_size: int) -> None:
        """It is about to run."""
        self.started_s, self.batch_size = time.perf_counter(), batch_size

    def take(self, token_id: int) -> None:
        """Take the next token. What follows from it is posted; ``flush`` sends it."""
        if self.first_token_s == 0.0:
            self.first_token_s = time.perf_counter()
            self._post(self.began, None)
        if self.row.take(token_id):
            self._end()

    def end(self) -> None:
        """The answer is complete."""
        if not self.is_done:
            self._end()
            flush([self])

    def fail(self, error: RequestError) -> None:
        """There will be no answer, or no more of it."""
        if self.ended_s == 0.0:
            self.ended_s = time.perf_counter()
            self.row.fail(error.message)
            self._post(self.began, error)
            self._post(self.finished, error)
            flush([self])

    def timings_ms(self) -> dict[str, float]:
        """The steps so far, and their times: waiting, steps of the engine, prefill, decoding."""
        found = {}
        if self.started_s:
            found["queue"] = self.started_s - self.created_s
        if self.first_token_s:
            found["prefill"] = self.first_token_s - self.started_s
        if self.ended_s and self.first_token_s:
            found["decode"] = self.ended_s - self.first_token_s
        steps = dict(self.report["timings_ms"]) if self.report is not None else {}
        return {name: 1e3 * value for name, value in found.items()} | steps

    def _end(self) -> None:
        self.ended_s = time.perf_counter()
        self.row.end()
        self._post(self.began, None)
        self._post(self.finished, None)

    def _post(self, future: asyncio.Future[None], error: RequestError | None) -> None:
        self.row.posted.append(partial(_resolve, future, error))


def flush(jobs: Sequence[Job]) -> None:
    """Let the event loop make the calls that jobs have posted."""
    for loop in {job.loop for job in jobs}:
        calls = [call for job in jobs if job.loop is loop for call in _taken(job.row.posted)]
        if calls and not loop.is_closed():
            loop.call_soon_threadsafe(_make, calls)


def _taken(posted: deque[Callable[[], object]]) -> Iterator[Callable[[], object]]:
    while True:
        try:
            yield posted.popleft()  # another thread may take some, too
        except IndexError:
            return


def _make(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _resolve(future: asyncio.Future[None], error: RequestError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
