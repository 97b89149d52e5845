"""Serves decoders that attend to media items through cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_fx.errors import Reason
from vlcache_fx.runtime.encode import EncoderRunner
from vlcache_fx.runtime.programs.lowered import Lowered
from vlcache_fx.runtime.report import Report
from vlcache_fx.runtime.state import ServingState


class CrossAttendingRunner:
    """A compiled decoder with cross-attention: takes the graph's inputs, returns its outputs. Reuse is exact.

    Args:
        encoder: computes all values that depend on the items alone, such as keys and values of
            cross-attention.
        decoder: the rest of the graph; takes these values as further inputs.
        engine: receives reports.
    """

    def __init__(self, encoder: EncoderRunner, decoder: Lowered, engine: ServingState) -> None:
        self._encoder, self._decoder, self._engine = encoder, decoder, engine

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one request."""
        attended, hit = self._encoder(args)
        results = self._decoder([*args, *attended])
        reason = None if hit else "the attended item is new"
        code = None if hit else Reason.NEW_ITEM
        self._engine.report(Report("warm" if hit else "cold", reason, encoder_hit=hit, reason_code=code))
        return results
