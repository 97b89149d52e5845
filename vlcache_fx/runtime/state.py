"""What the graphs of one model share while they serve: store, settings, guards, counts and refusals."""

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlcache_fx.errors import (
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
        settings: policy, budget and profile of the next call.
        guards: which models go without reuse.
        fingerprints: of weights.
        graphs: of one model, as compiled; by number. They live as long as the engine.
        contents: what items held that were looked up lately, and with which weights.
        missed: keys of items that were looked up in vain.
        unstorable: keys of donors that the store refused, as too large: recording them again would not help.
        pending: what encoders outside the decoder's graph tell its next call.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.settings = ThreadSettings(_settings(self.options))
        self.store = open_store(self.options.store, self.options.capacity_bytes)
        self.guards = Guards(self.options)
        self.refusals: list[UnsupportedGraphError] = []
        self.graphs: dict[int, Callable[..., Sequence[Any]]] = {}
        self.graph_numbers = itertools.count()
        self._closed = self._said_closed = False
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
        """Calls of compiled graphs that this thread has made."""
        return int(getattr(self._call, "graphs", 0))

    def note_graph_call(self) -> None:
        """A compiled graph is called."""
        self._call.graphs = self.graph_calls + 1

    def set_options(self, options: Options) -> None:
        """Other options from now on; store and lowering stay what they are."""
        self.options, self.settings.default = options, _settings(options)

    def report(self, report: Report, *, continues: bool = False) -> None:
        """Keep the report of a call and count it.

        Args:
            report: of the call.
            continues: a call without media that goes on with a cache; what the call before did stays the
                last report, where that had media.
        """
        with self._lock:
            if not (continues and self._report is not None and self._report.spans):
                self._report = report
            self._counts[report.mode] += 1

    def count(self, what: str) -> None:
        """Add one to a count."""
        with self._lock:
            self._counts[what] += 1

    def ran_uncompiled(self, refusal: UnsupportedGraphError) -> None:
        """A call in which no graph of this engine ran."""
        self.count("uncompiled_calls")
        self.bypass(refusal)

    def bypass(self, refusal: UnsupportedGraphError) -> None:
        """Report a call that runs unmodified; logged once for each reason, raised in strict mode."""
        self.refuse_call(refusal)
        self.report(Report("bypass", one_line(str(refusal)), reason_code=refusal.reason))

    def refuse(self, refusal: UnsupportedGraphError) -> None:
        """Log a refusal, each text once, or raise it in strict mode."""
        if self.options.strict:
            raise refusal
        with self._lock:
            known = any(str(other) == str(refusal) for other in self.refusals)
            self.refusals.append(refusal)
        if not known:
            log.warning("runs unmodified: %s", refusal)

    def refuse_call(self, refusal: UnsupportedGraphError) -> None:
        """As ``refuse``, for a single call of a graph whose other calls may be served; logged once."""
        if self.options.strict:
            raise refusal
        with self._lock:
            kinds = {(other.reason, other.node) for other in self.refusals}
            known = (refusal.reason, refusal.node) in kinds
            if not known:
                self.refusals.append(refusal)
        if not known:
            log.warning("runs unmodified: %s", refusal)

    def refuse_weights(self, error: UnreadableWeightsError) -> str:
        """Calls of a model whose weights cannot be read, one text for all of them; see ``refuse_call``."""
        refusal = UnsupportedGraphError(Reason.WEIGHTS_UNREADABLE, str(error))
        self.refuse_call(refusal)
        return str(refusal)

    def refuse_shadow(self, refusal: UnsupportedGraphError) -> None:
        """Shadow runs of a graph that is served otherwise; logged once per engine, raised in strict mode."""
        if self.options.strict:
            raise refusal
        with self._lock:
            known = any(other.reason == refusal.reason for other in self.refusals)
            self.refusals.append(refusal)
        if not known:
            log.warning("no shadow runs: %s", refusal)

    @contextmanager
    def tolerating_store_errors(self) -> Iterator[None]:
        """A store that fails in the body costs reuse, never the request; raised in strict mode.

        A closed store is no failure: somebody wanted it so.
        """
        try:
            yield
        except StoreError as error:
            if self._closed or isinstance(error, StoreClosedError):
                self._say_closed()
                return
            if self.options.strict:
                raise
            self.count("store_failures")
            log.warning("store failed, computing instead: %s", error)

    def _say_closed(self) -> None:
        with self._lock:
            said, self._said_closed = self._said_closed, True
        if not said:
            log.warning("the store is closed: calls go on without reuse")

    def plan_failed(self, error: PlanError | PolicyError) -> None:
        """A policy whose rows cannot be executed costs reuse, never the request."""
        self.count("plan_failures")
        log.warning("no plan, computing instead: %s", error)


def _settings(options: Options) -> CallSettings:
    profile = None if options.profile is None else Profile.load(options.profile)
    return CallSettings(get_policy(options.policy), options.budget, profile)
