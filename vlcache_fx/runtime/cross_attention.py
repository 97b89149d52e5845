"""Runs a decoder that attends to items from outside: their keys and values are kept as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_fx.errors import Reason
from vlcache_fx.runtime.encode import EncoderRunner
from vlcache_fx.runtime.programs.lowered import Lowered
from vlcache_fx.runtime.report import Report
from vlcache_fx.runtime.state import ServingState


class CrossAttendingRunner:
    """A compiled graph: call it with the graph's inputs, get the graph's outputs. Reuse is exact.

    Args:
        encoder: from the graph's inputs to what depends on the items alone, keys and values included.
        decoder: the rest, which takes these as further inputs.
        engine: takes the reports.
    """

    def __init__(self, encoder: EncoderRunner, decoder: Lowered, engine: ServingState) -> None:
        self._encoder, self._decoder, self._engine = encoder, decoder, engine

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one request."""
        attended, hit = self._encoder(args)
        results = self._decoder([*args, *attended])
        reason = None if hit else "the item that it attends to is new"
        code = None if hit else Reason.NEW_ITEM
        self._engine.report(Report("warm" if hit else "cold", reason, encoder_hit=hit, reason_code=code))
        return results
