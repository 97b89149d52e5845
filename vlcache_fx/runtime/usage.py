"""What calls reused: counts, and an estimate of the time saved."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.report import Report

MAX_MODELS = 1024

NEW_SHARE = 0.25
"""Weight of the latest cold call in the moving average."""


@dataclass(frozen=True)
class ReusedTokens:
    """Tokens of a call whose rows came from donors.

    Attributes:
        reused: tokens read from donors. A token that some layers recompute counts by its share of layers.
        recomputed: tokens of reused spans that were computed nevertheless, likewise.
    """

    reused: int = 0
    recomputed: int = 0


def reused_tokens(report: Report) -> ReusedTokens:
    """Return the tokens that a call read from donors; none for a shadow run, which computes all."""
    if report.mode != "warm" or report.shadow_kl is not None:
        return ReusedTokens()
    hits = [span for span in report.spans if span.hit]
    in_spans = sum(span.length for span in hits)
    in_prefix = sum(span.length for span in hits if span.start + span.length <= report.prefix_tokens)
    recomputed = round(report.token_layer_fraction * in_spans)
    return ReusedTokens(in_spans - recomputed + max(0, report.prefix_tokens - in_prefix), recomputed)


class Usage:
    """Counts of one engine. Not safe in threads: the engine holds its lock."""

    def __init__(self) -> None:
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._reused = self._recomputed = 0
        self._seconds_saved = 0.0
        self._cold: OrderedDict[str, Pace] = OrderedDict()
        self._num_compilations = 0

    def add(self, report: Report, num_compilations: int = 0) -> None:
        """Count a call.

        Args:
            report: its report.
            num_compilations: compilations since the start. A call during which their number rose does not
                tell how long a cold call takes.
        """
        compiled, self._num_compilations = (
            num_compilations != self._num_compilations,
            num_compilations,
        )
        self._hits.update(span.donor_tier or "" for span in report.spans if span.hit)
        self._misses.update(str(span.miss_reason) for span in report.spans if span.miss_reason is not None)
        if report.reason_code is not None:
            self._reasons[str(report.reason_code)] += 1
        tokens = reused_tokens(report)
        self._reused += tokens.reused
        self._recomputed += tokens.recomputed
        self._add_time(report, compiled)

    def stats(self) -> dict[str, Any]:
        """Return the counts: ``spans``, ``reasons``, ``tokens`` and ``seconds_saved``."""
        return {
            "spans": {"hits": dict(self._hits), "misses": dict(self._misses)},
            "reasons": dict(self._reasons),
            "tokens": {"reused": self._reused, "recomputed": self._recomputed},
            "seconds_saved": self._seconds_saved,
        }

    def _add_time(self, report: Report, compiled: bool) -> None:
        samples = 1 + max((span.sample for span in report.spans), default=0)
        num_tokens = report.num_tokens * samples
        if not num_tokens or not report.model_fingerprint or report.shadow_kl is not None:
            return
        elapsed_s = sum(report.timings_ms.values()) / 1e3
        pace = self._cold.get(report.model_fingerprint)
        if report.mode == "cold":
            if pace is None:  # programs run for the first time: slower than later
                self._cold[report.model_fingerprint] = Pace(NEW_SHARE)
                while len(self._cold) > MAX_MODELS:
                    self._cold.popitem(last=False)
            elif not compiled:
                pace.add(num_tokens, elapsed_s)
        elif report.mode == "warm" and pace is not None:
            self._seconds_saved += max(0.0, (pace.seconds(num_tokens) or 0.0) - elapsed_s)
