"""State shared by the graphs of one model: store, settings, guards, counts and refusals."""

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlcache_fx.errors import (
    DamagedEntryError,
    PlanError,
    PolicyError,
    Reason,
    StoreClosedError,
    StoreError,
    UnreadableWeightsError,
    UnsupportedGraphError,
)
from vlcache_fx.options import Options
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.runtime.call_context import PendingContext
from vlcache_fx.runtime.donors.recent_keys import Fingerprints, RecentContents, RecentKeys
from vlcache_fx.runtime.guards.guards import Guards
from vlcache_fx.runtime.report import Report, one_line
from vlcache_fx.runtime.settings import CallSettings, ThreadSettings
from vlcache_fx.store import open_store

log = logging.getLogger("vlcache_fx")


class ServingState:
    """The part of an engine that runners use. Safe to share between threads.

    Args:
        options: checked options.

    Attributes:
        settings: policy, budget and profile of calls.
        guards: shadow runs, and the models whose reuse is off.
        fingerprints: fingerprints of weights.
        graphs: compiled graphs by number; they live as long as the engine.
        contents: digests of recent items, and the weights with which they were looked up.
        missed: recent keys without a donor.
        unstorable: keys of donors that the store refused as too large; they are not recorded again.
        pending: context of the next call, from encoders outside the decoder's graph.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.settings = ThreadSettings(_settings(self.options))
        self.store = open_store(self.options.store, self.options.capacity_bytes, strict=self.options.strict)
        self.guards = Guards(self.options)
        self.refusals: list[UnsupportedGraphError] = []
        self.graphs: dict[int, Callable[..., Sequence[Any]]] = {}
        self.graph_numbers = itertools.count()
        self._closed = self._logged_closed = False
        self._report: Report | None = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.fingerprints = Fingerprints()
        self.missed, self.unstorable = RecentKeys(), RecentKeys()
        self.contents = RecentContents()
        self.pending = PendingContext()
        self._call = threading.local()

    @property
    def graph_calls(self) -> int:
        """Number of compiled graphs that this thread has called."""
        return int(getattr(self._call, "graphs", 0))

    def note_graph_call(self) -> None:
        """Count a call of a compiled graph."""
        self._call.graphs = self.graph_calls + 1

    def set_options(self, options: Options) -> None:
        """Use other options from now on; store and lowering stay."""
        self.options, self.settings.default = options, _settings(options)

    def report(self, report: Report, *, continues: bool = False) -> None:
        """Keep the report of a call and count it.

        Args:
            report: report of the call.
            continues: the call has no media and continues a prompt in a cache. The last report then stays
                that of the call before, if it had media.
        """
        with self._lock:
            if not (continues and self._report is not None and self._report.spans):
                self._report = report
            self._counts[report.mode] += 1

    def count(self, event: str) -> None:
        """Count an event."""
        with self._lock:
            self._counts[event] += 1

    def ran_uncompiled(self, refusal: UnsupportedGraphError) -> None:
        """Count and report a call in which no graph of this engine ran."""
        self.count("uncompiled_calls")
        self.bypass(refusal)

    def bypass(self, refusal: UnsupportedGraphError) -> None:
        """Report a call that runs unmodified; log each reason once, or raise it in strict mode."""
        self.refuse_call(refusal)
        self.report(Report("bypass", one_line(str(refusal)), reason_code=refusal.reason))

    def refuse(self, refusal: UnsupportedGraphError) -> None:
        """Add a refusal; log each text once, or raise it in strict mode."""
        if self.options.strict:
            raise refusal
        with self._lock:
            is_known = any(str(other) == str(refusal) for other in self.refusals)
            self.refusals.append(refusal)
        if not is_known:
            log.warning("vlcache: running unmodified: %s", refusal)

    def refuse_call(self, refusal: UnsupportedGraphError) -> None:
        """Add a refusal of a single call, once per reason and node; log it, or raise it in strict mode."""
        if self.options.strict:
            raise refusal
        with self._lock:
            kinds = {(other.reason, other.node) for other in self.refusals}
            is_known = (refusal.reason, refusal.node) in kinds
            if not is_known:
                self.refusals.append(refusal)
        if not is_known:
            log.warning("vlcache: running unmodified: %s", refusal)

    def refuse_weights(self, error: UnreadableWeightsError) -> str:
        """Add the refusal of a model with unreadable weights, and return its text; see ``refuse_call``."""
        refusal = UnsupportedGraphError(Reason.WEIGHTS_UNREADABLE, str(error))
        self.refuse_call(refusal)
        return str(refusal)

    def refuse_shadow(self, refusal: UnsupportedGraphError) -> None:
        """Add a refusal of shadow runs, not of reuse; log each reason once, or raise it in strict mode."""
        if self.options.strict:
            raise refusal
        with self._lock:
            is_known = any(other.reason == refusal.reason for other in self.refusals)
            self.refusals.append(refusal)
        if not is_known:
            log.warning("vlcache: no shadow runs: %s", refusal)

    @contextmanager
    def tolerating_store_errors(self) -> Iterator[None]:
        """Log store errors of the body: they cost reuse, never the request. Raise them in strict mode.

        A closed store is not a failure.
        """
        try:
            yield
        except StoreError as error:
            if self._closed or isinstance(error, StoreClosedError):
                self._log_closed()
                return
            if self.options.strict:
                raise
            self.count("store_failures")
            if isinstance(error, DamagedEntryError):
                return  # the store has logged it
            log.warning("vlcache: the store failed, computing without reuse: %s", error)

    def _log_closed(self) -> None:
        with self._lock:
            was_logged, self._logged_closed = self._logged_closed, True
        if not was_logged:
            log.warning("vlcache: the store is closed, continuing without reuse")

    def plan_failed(self, error: PlanError | PolicyError) -> None:
        """Count and log a plan that cannot be executed: it costs reuse, never the request."""
        self.count("plan_failures")
        log.warning("vlcache: no valid plan, computing without reuse: %s", error)


def _settings(options: Options) -> CallSettings:
    profile = None if options.profile is None else Profile.load(options.profile)
    return CallSettings(get_policy(options.policy), options.budget, profile)
