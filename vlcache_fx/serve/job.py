"""A request that waits or runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlcache_fx.runtime.usage import reused_tokens
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
        report: the engine's report of the prefill, of this prompt alone; None before, or without one.
        batch_size: with how many prompts it ran, itself included.
        created_s, started_s, first_token_s, ended_s: times of ``time.perf_counter``; 0.0 before.
    """

    inputs: Mapping[str, Tensor]
    config: GenerationConfig
    settings: RequestSettings
    group: Hashable
    row: Row
    loop: asyncio.AbstractEventLoop
    seed: int | None = None
    report: ReportView | None = None
    batch_size: int = 0
    is_cancelled: bool = False
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
            future.add_done_callback(_retrieve)

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

    def start(self, batch_size: int) -> None:
        """It is about to run."""
        self.started_s, self.batch_size = time.perf_counter(), batch_size

    def take(self, token_id: int) -> None:
        """Take the next token."""
        if self.first_token_s == 0.0:
            self.first_token_s = time.perf_counter()
            self._resolve(self.began, None)
        if self.row.take(token_id):
            self.end()

    def end(self) -> None:
        """The answer is complete."""
        if not self.is_done:
            self.ended_s = time.perf_counter()
            self.row.end()
            self._resolve(self.began, None)
            self._resolve(self.finished, None)

    def fail(self, error: RequestError) -> None:
        """There will be no answer, or no more of it."""
        if self.ended_s == 0.0:
            self.ended_s = time.perf_counter()
            self.row.fail(error.message)
            self._resolve(self.began, error)
            self._resolve(self.finished, error)

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

    def _resolve(self, future: asyncio.Future[None], error: RequestError | None) -> None:
        def resolve() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(resolve)


def _retrieve(future: asyncio.Future[None]) -> None:
    """Mark the error of a future as seen: not every job has someone who waits for both of its futures."""
    if not future.cancelled():
        future.exception()
