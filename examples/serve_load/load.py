"""Sends a trace with the client of OpenAI, and measures what it gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from openai import APIError, AsyncOpenAI

from examples.serve_load.traces import Ask


@dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
        text: the answer; empty if the request failed.
        first_s, total_s: seconds until the first token, and until the last.
        prompt_tokens, answer_tokens: as the server counts them.
        cached_tokens: as the server counts them; None if it or the client does not tell.
        failure: why there is no answer; None if there is one.
    """

    text: str
    first_s: float
    total_s: float
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    answer_tokens: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Load:
    """The answers to a trace.

    Attributes:
        results: in the order of the trace.
        elapsed_s: time of all of them.
    """

    results: Sequence[Result]
    elapsed_s: float

    def summary(self, asks: Sequence[Ask]) -> dict[str, Any]:
        """Figures of the load; times in milliseconds."""
        done = [result for result in self.results if result.failure is None]
        first = [1e3 * result.first_s for result in done] or [float("nan")]
        known = [(ask, got) for ask, got in zip(asks, self.results, strict=True) if ask.answer is not None]
        counted = [(got.cached_tokens, got.prompt_tokens) for got in done if got.cached_tokens is not None]
        prompt = sum(tokens for _, tokens in counted)
        return {
            "requests": len(self.results),
            "failed": len(self.results) - len(done),
            "ttft_ms": {str(share): float(np.percentile(first, share)) for share in (50, 95, 99)},
            "requests_per_s": len(done) / self.elapsed_s,
            "tokens_per_s": sum(result.answer_tokens for result in done) / self.elapsed_s,
            "cached_share": sum(cached for cached, _ in counted) / prompt if prompt else None,
            "wrong": sum(ask.answer != got.text.strip() for ask, got in known) if known else None,
        }


async def send(
    asks: Sequence[Ask],
    url: str,
    model: str,
    *,
    at_once: int,
    answer_tokens: int,
    extra_body: Mapping[str, Any],
) -> Load:
    """Send a trace: ``at_once`` sessions at a time, the requests of each one after the other."""
    client = AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=600)
    slots = asyncio.Semaphore(at_once)
    found: dict[int, Result] = {}

    async def session(numbered: Sequence[tuple[int, Ask]]) -> None:
        async with slots:
            for number, ask in numbered:
                found[number] = await _ask(client, model, ask, answer_tokens, extra_body)

    grouped = groupby(enumerate(asks), lambda pair: pair[1].session)
    begin = time.perf_counter()
    await asyncio.gather(*(session(list(pairs)) for _, pairs in grouped))
    elapsed_s = time.perf_counter() - begin
    await client.close()
    return Load([found[number] for number in range(len(asks))], elapsed_s)


async def _ask(
    client: AsyncOpenAI, model: str, ask: Ask, answer_tokens: int, extra_body: Mapping[str, Any]
) -> Result:
    begin, first_s, usage = time.perf_counter(), float("nan"), None
    parts: list[str] = []
    given: Any = {"messages": list(ask.messages), "extra_body": dict(extra_body)}
    try:
        stream = await client.chat.completions.create(
            model=model,
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=answer_tokens,
            temperature=0,
            **given,
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first_s = time.perf_counter() - begin if not parts else first_s
                parts.append(text)
    except APIError as error:
        return Result("", first_s, time.perf_counter() - begin, failure=f"{type(error).__name__}: {error}")
    details = getattr(usage, "prompt_tokens_details", None)
    return Result(
        "".join(parts),
        first_s,
        time.perf_counter() - begin,
        getattr(usage, "prompt_tokens", 0),
        getattr(details, "cached_tokens", None),
        getattr(usage, "completion_tokens", 0),
        None if parts else "no text in the answer",
    )
