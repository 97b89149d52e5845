"""Guards: select warm requests for shadow runs, and bypass models after violations."""

import copy
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vlcache_fx.options import Options
from vlcache_fx.runtime.guards.shadow import Comparison

log = logging.getLogger("vlcache_fx")

MAX_MODELS = 1024


@dataclass
class _Model:
    """State of one model: shadow-run credit, violations, and the reason of a bypass."""

    credit: Fraction = Fraction(0)
    violations: int = 0
    reason: str | None = None


class Guards:
    """The guards of one engine. The fingerprint of a decoder's weights identifies its model.

    Safe to share between threads.

    Args:
        options: reads ``shadow``, ``shadow_max_kl`` and ``shadow_max_violations``.
    """

    def __init__(self, options: Options) -> None:
        self._max_kl, self._max_violations = options.shadow_max_kl, options.shadow_max_violations
        # Exact, so that a share of 0.1 means every tenth request, without drift.
        self._share = Fraction(options.shadow).limit_denominator(10**6)
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._runs = self._flips = self._violations = self._finite = 0
        self._sum_kl = self._max_seen_kl = 0.0
        self._lock = threading.Lock()
        self._thread = threading.local()

    def is_due(self, model: str) -> bool:
        """Count a warm request; return True if it needs a shadow run.

        Deterministic: each request adds the share to a credit, and a credit of 1 pays for a shadow run.
        """
        if not self._share or self._are_off():
            return False
        with self._lock:
            state = self._of(model)
            state.credit += self._share
            if state.credit < 1:
                return False
            state.credit -= 1
            return True

    def record(self, model: str, comparison: Comparison) -> None:
        """Count a shadow run; bypass the model after too many violations."""
        is_finite = math.isfinite(comparison.kl)
        exceeds = self._max_kl is not None and not comparison.kl <= self._max_kl
        with self._lock:
            self._runs += 1
            self._flips += comparison.flip
            if is_finite:
                self._finite += 1
                self._sum_kl += comparison.kl
                self._max_seen_kl = max(self._max_seen_kl, comparison.kl)
            if not (comparison.flip or exceeds or not is_finite):
                return
            self._violations += 1
            state = self._of(model)
            state.violations += 1
            reached = state.violations == self._max_violations
        if reached:
            bound = "" if self._max_kl is None else f" or had a mean KL above {self._max_kl:g}"
            violations = f"{self._max_violations} shadow runs predicted another next token{bound}"
            self.bypass(model, f"{violations}; engine.resume() lifts this")

    def bypass(self, model: str, reason: str) -> None:
        """Bypass reuse for a model from now on; log it once."""
        with self._lock:
            state = self._of(model)
            is_new, state.reason = state.reason is None, reason
        if is_new:
            log.warning("vlcache: continuing without reuse (weights %s): %s", model[:12], reason)

    def reason(self, model: str) -> str | None:
        """Return the reason of a model's bypass; None without a bypass."""
        if self._are_off():
            return None
        with self._lock:
            state = self._models.get(model)
        return None if state is None else state.reason

    def resume(self, models: Iterable[str] | None = None) -> None:
        """End the bypass of models (all by default) and reset their violations."""
        with self._lock:
            for model in list(self._models) if models is None else models:
                self._models.pop(model, None)

    def without_runs(self) -> "Guards":
        """Return guards with the same bypassed models that ask for no shadow runs."""
        others = copy.copy(self)
        others._share = Fraction(0)
        return others

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn guards off for calls of this thread in the body."""
        before = self._are_off()
        self._thread.off = True
        try:
            yield
        finally:
            self._thread.off = before

    def stats(self) -> dict[str, Any]:
        """Return counts over all models: ``runs``, ``mean_kl`` and ``max_kl`` (of finite values), ``flips``,
        ``violations`` and ``bypassed_models``."""
        with self._lock:
            return {
                "runs": self._runs,
                "mean_kl": self._sum_kl / self._finite if self._finite else 0.0,
                "max_kl": self._max_seen_kl,
                "flips": self._flips,
                "violations": self._violations,
                "bypassed_models": sum(state.reason is not None for state in self._models.values()),
            }

    def _are_off(self) -> bool:
        return bool(getattr(self._thread, "off", False))

    def _of(self, model: str) -> _Model:
        state = self._models.setdefault(model, _Model())
        self._models.move_to_end(model)
        while len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return state
