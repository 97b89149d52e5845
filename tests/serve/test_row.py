"""The text of one answer, with and without transformers' parsers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.cli.serving.utils import ToolCall, _StreamError

from vlcache_fx.serve.row import Row

from .fakes import EOS, tokenizer


def sent(tokens: list[int], *, parser: Any = None, stops: tuple[str, ...] = (), length: int = 50) -> Any:
    """The row after these tokens, and what it sent."""

    queue: asyncio.Queue[Any] = asyncio.Queue()
    row = Row(tokenizer(), length, {EOS}, stops=stops, queue=queue, parser=parser)
    for token in tokens:
        if row.take(token):
            break
    row.end()
    return row, received(row, queue)


def received(row: Row, queue: asyncio.Queue[Any]) -> list[Any]:
    """What comes out of the queue when the event loop makes the calls."""
    while row.posted:
        row.posted.popleft()()
    return [queue.get_nowait() for _ in range(queue.qsize())]


@given(st.lists(st.integers(1, 98), max_size=8), st.integers(1, 9))
def test_text_is_that_of_the_tokens(tokens: list[int], length: int) -> None:
    row, items = sent(tokens, length=length)
    kept = tokens[:length]
    assert row.token_ids == kept
    assert items[-1] is None
    assert "".join(items[:-1]).split() == [f"w{token}" for token in kept]
    assert row.finish_reason == ("length" if len(tokens) >= length else None)


def test_end_token_at_the_longest_length_is_an_end() -> None:
    row, _ = sent([1, EOS], length=2)
    assert row.finish_reason == "stop"
    assert row.take(5)
    assert row.token_ids == [1, EOS]


class Parser:
    """Parses ``w1`` as a call of a tool, and fails on ``w2``."""

    initial_events: tuple[Any, ...] = ()

    def __init__(self, *, fails_at_end: bool = False) -> None:
        self.fails_at_end = fails_at_end

    def feed(self, text: str) -> list[dict[str, Any]]:
        if "w2" in text:
            raise ValueError("no JSON")
        if "w1" in text:
            call = {"function": {"name": "f", "arguments": {}}}
            return [{"type": "region_close", "field": "tool_calls", "value": call}]
        return [{"type": "region_chunk", "field": "content", "text": text}]

    def finalize(self) -> tuple[dict[str, Any], list[Any]]:
        if self.fails_at_end:
            raise ValueError("no JSON")
        return {}, []


@pytest.mark.parametrize("fails_at_end", [False, True])
def test_parsers(fails_at_end: bool) -> None:
    _, items = sent([3, 1], parser=Parser(fails_at_end=fails_at_end))
    assert items == ["w3", ToolCall("f", "{}"), None]


def test_what_a_parser_does_not_take_comes_as_text() -> None:
    _, items = sent([3, 2, 1], parser=Parser())
    assert "".join(items[:-1]).split() == ["w3", "w2", "w1"]


def test_failures_reach_the_client() -> None:
    queue: asyncio.Queue[Any] = asyncio.Queue()
    row = Row(tokenizer(), 5, {EOS}, queue=queue)
    row.fail("it failed")
    (error,) = received(row, queue)
    assert isinstance(error, _StreamError)
    assert error.msg == "it failed"
