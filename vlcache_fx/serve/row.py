"""The answer of one request, token by token, on its way to the client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal

from transformers.cli.serving.utils import _StreamError, response_events_to_chunks

from vlcache_fx.serve.stop_strings import StopStrings

FinishReason = Literal["stop", "length"]

PARSING_FAILED = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""What transformers' parsers raise on answers that are not as they expect."""


class Row:
    """Takes the tokens of one row of a batch, decides when it ends, and sends its text to a queue.

    Used by the thread that generates. The queue and its items are those of transformers' streamers.

    Args:
        tokenizer: the tokenizer of the library ``tokenizers``.
        max_new_tokens: the longest answer, in tokens.
        eos_token_ids: tokens that end an answer.
        stops: stop strings.
        queue: where the text goes; None to only collect tokens.
        parser: transformers' parser of reasoning and tool calls; None for plain text.

    Attributes:
        token_ids: the tokens so far.
        finish_reason: why the answer ended; None before.
        posted: calls that are to be made in the event loop, oldest first. Those of a step are made at once:
            to wake the loop for each of them would make this thread wait for it.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        *,
        stops: Sequence[str] = (),
        queue: asyncio.Queue[Any] | None = None,
        parser: Any = None,
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._max_new_tokens, self._eos = tokenizer, max_new_tokens, frozenset(eos_token_ids)
        self._stops = StopStrings(stops)
        self._queue, self._parser = queue, parser
        self.posted: deque[Callable[[], object]] = deque()
        # Only where someone needs the text: a queue, or stop strings.
        needs_text = queue is not None or bool(stops)
        self._stream = DecodeStream([], skip_special_tokens=parser is None) if needs_text else None
        if parser is not None:
            self._send_all(response_events_to_chunks(parser.initial_events))

    @property
    def total_tokens(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    def take(self, token_id: int) -> bool:
        """Take the next token; return whether the answer ends with it. Later tokens are ignored."""
        if self.finish_reason is not None:
            return True
        self.token_ids.append(token_id)
        if self._stream is not None:
            text = self._stream.step(self._tokenizer, token_id)
            if text is not None:
                self._send_text(self._stops.feed(text))
        if token_id in self._eos or self._stops.is_found:
            self.finish_reason = "stop"
        elif self.total_tokens >= self._max_new_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def end(self) -> None:
        """Send what is left, and the end."""
        self._send_text(self._stops.finish())
        if self._parser is not None:
            try:
                _, events = self._parser.finalize()
                self._send_all(response_events_to_chunks(events))
            except PARSING_FAILED:
                pass  # The answer ends within a tool call; transformers leaves it out, too.
        self._send(None)

    def fail(self, message: str) -> None:
        """Send an error instead of the end."""
        self._send(_StreamError(message))

    def _send_text(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._send(text)
        else:
            try:
                self._send_all(response_events_to_chunks(self._parser.feed(text)))
            except PARSING_FAILED:
                self._parser = None  # A tool call that is none: the rest comes as text.
                self._send(text)

    def _send_all(self, items: Sequence[Any]) -> None:
        for item in items:
            self._send(item)

    def _send(self, item: Any) -> None:
        if self._queue is not None:
            self.posted.append(partial(self._queue.put_nowait, item))
