"""Guards: which warm requests are computed in full as well, and which models are to go without reuse."""

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

MODELS_REMEMBERED = 1024


@dataclass
class _Model:
    """What is known of one model: the share of its next shadow run that has come together, and so on."""

    share: Fraction = Fraction(0)
    violations: int = 0
    reason: str | None = None


class Guards:
    """The guards of one engine. Models are told apart by the fingerprint of their decoder's weights.

    Safe to share between threads.

    Args:
        options: ``shadow``, ``shadow_max_kl`` and ``shadow_max_violations`` count.
    """

    def __init__(self, options: Options) -> None:
        self._max_kl, self._max_violations = options.shadow_max_kl, options.shadow_max_violations
        # Exact, so that a share of 0.1 means every tenth request for good.
        self._share = Fraction(options.shadow).limit_denominator(10**6)
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._runs = self._flips = self._violations = self._finite = 0
        self._sum_kl = self._max_seen_kl = 0.0
        self._lock = threading.Lock()
        self._thread = threading.local()

    def is_due(self, model: str) -> bool:
        """Count one more warm request; True where it is to be computed in full as well.

        No random numbers: shares are added up, and the request in which they reach 1 is due.
        """
        if not self._share or self._are_off():
            return False
        with self._lock:
            state = self._of(model)
            state.share += self._share
            if state.share < 1:
                return False
            state.share -= 1
            return True

    def record(self, model: str, comparison: Comparison) -> None:
        """Count a shadow run; the model goes without reuse after too many violations."""
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
            what = f"{self._max_violations} shadow runs gave another next token{bound}"
            self.bypass(model, f"{what}; engine.resume() lifts this")

    def bypass(self, model: str, reason: str) -> None:
        """Let a model go without reuse from now on; said once in the log."""
        with self._lock:
            state = self._of(model)
            is_new, state.reason = state.reason is None, reason
        if is_new:
            log.warning("goes on without reuse (weights %s): %s", model[:12], reason)

    def reason(self, model: str) -> str | None:
        """Why this model goes without reuse; None where it does not."""
        if self._are_off():
            return None
        with self._lock:
            state = self._models.get(model)
        return None if state is None else state.reason

    def resume(self, models: Iterable[str] | None = None) -> None:
        """Let models (all by default) reuse again, with their violations forgotten."""
        with self._lock:
            for model in list(self._models) if models is None else models:
                self._models.pop(model, None)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Calls of this thread in the body are not guarded."""
        before = self._are_off()
        self._thread.off = True
        try:
            yield
        finally:
            self._thread.off = before

    def stats(self) -> dict[str, Any]:
        """Counts over all models: ``runs``, mean and maximum of ``kl`` (those that are finite), ``flips``,
        ``violations``, and ``bypassed_models``."""
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
        while len(self._models) > MODELS_REMEMBERED:
            self._models.popitem(last=False)
        return state
