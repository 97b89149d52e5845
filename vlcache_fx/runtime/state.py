"""State shared by the graphs of one model: store, settings, guards, counts and refusals."""

import itertools
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

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
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.log_output import apply_log_variable
from vlcache_fx.options import Options
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.runtime.call_context import PendingContext
from vlcache_fx.runtime.collected import ContextReports
from vlcache_fx.runtime.context_value import ContextValue
from vlcache_fx.runtime.donors.miss_log import MissLog
from vlcache_fx.runtime.donors.recent_keys import Fingerprints, RecentKeys, ReturnCounts
from vlcache_fx.runtime.guards.guards import Guards
from vlcache_fx.runtime.idle import IdleTime
from vlcache_fx.runtime.in_flight import Claim, InFlight, Missing
from vlcache_fx.runtime.observation import Observations
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.report import Report, one_line
from vlcache_fx.runtime.settings import CallSettings, ContextSettings
from vlcache_fx.runtime.usage import Usage
from vlcache_fx.store import Entry, open_store
from vlcache_fx.store.clears import Clears

log = logging.getLogger("vlcache_fx")

T = TypeVar("T")


class ServingState:
    """The part of an engine that runners use. Safe to share between threads.

    Args:
        options: checked options.

    Attributes:
        settings: policy, budget, profile and salt of calls.
        guards: shadow runs, and the models whose reuse is off.
        fingerprints: fingerprints of weights.
        graphs: compiled graphs by number; they live as long as the engine.
        misses: recent lookups and misses, to explain the misses.
        missed: recent keys without a donor.
        unstorable: keys of entries that the store refused as too large; such donors are not recorded again.
        pending: context of the next call, from encoders outside the decoder's graph.
        in_flight: the keys that requests compute at present.
        returns: how often recent items were computed exactly when they returned.
        idle: work for times in which no request runs.
        clears: the latest calls of ``clear``.
        observed: what is collected of this context's calls; only in ``observing``.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        apply_log_variable()
        self.options = options or Options()
        self.settings = ContextSettings(_settings(self.options))
        self.store = open_store(self.options.store, self.options.capacity_bytes, strict=self.options.strict)
        self.guards = Guards(self.options)
        self.refusals: list[UnsupportedGraphError] = []
        self.graphs: dict[int, Callable[..., Sequence[Any]]] = {}
        self.graph_numbers = itertools.count()
        self._closed = self._logged_closed = False
        self._reports = ContextReports()
        self._counts: Counter[str] = Counter()
        self._usage = Usage()
        self._lock = threading.Lock()
        self.fingerprints = Fingerprints()
        self.missed, self.unstorable = RecentKeys(), RecentKeys()
        self.misses = MissLog()
        self.pending = PendingContext()
        self.in_flight, self.clears = InFlight(), Clears()
        self.observed: ContextValue[Observations] = ContextValue()
        self._call = threading.local()
        self.returns = ReturnCounts()
        self.idle = IdleTime(self.options.idle_refinement)
        weakref.finalize(self, self.idle.close)  # its thread knows nothing of the engine

    @property
    def key_salt(self) -> str:
        """First part of every key of this context's next call; see ``Options.key_salt``."""
        return self.options.key_salt_of(self.settings.current.salt)

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
            continues: see ``ContextReports.add``.
        """
        self._reports.add(report, continues=continues)
        with self._lock:
            self._counts[report.mode] += 1
            self._usage.add(report, self.num_compilations)

    @contextmanager
    def observing(self) -> Iterator[Observations]:
        """Collect rows, spans and donors of the calls in the body, in this context and in copies of it."""
        used_at: dict[str, float] = {}
        with suppress(StoreError):
            used_at = {entry.key: entry.used_at for entry in self.store.entries()}
        observations = Observations(used_at)
        with self.observed.using(observations):
            yield observations

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Measure the body in ``observing``; elsewhere do nothing."""
        observations = self.observed.get()
        return nullcontext() if observations is None else observations.clock.measure(name)

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

        A closed store is not a failure. A damaged entry is a miss, also in strict mode.
        """
        try:
            yield
        except StoreError as error:
            if self._closed or isinstance(error, StoreClosedError):
                self._log_closed()
                return
            if self.options.strict and not isinstance(error, DamagedEntryError):
                raise
            self.count("store_failures")
            if isinstance(error, DamagedEntryError):
                return  # the store has logged it
            log.warning("vlcache: the store failed, computing without reuse: %s", error)

    def find_or_claim(
        self, find: Callable[[T | None], T], missing: Callable[[T], Missing]
    ) -> tuple[T, Claim]:
        """See ``InFlight.find_or_claim``. On a closed engine no request waits for another."""
        return self.in_flight.find_or_claim(find, missing, may_wait=self._may_wait())

    def _may_wait(self) -> bool:
        return not self._closed

    def missing(self, keys: Iterable[str], expected_s: float | None) -> Missing:
        """Return what a request computes that found none of ``keys``, without those that are too large."""
        storable = [key for key in keys if key not in self.unstorable]
        return Missing(storable, storable, expected_s)

    @contextmanager
    def timing(self, pace: Pace, units: int) -> Iterator[None]:
        """Add the time of the body to ``pace``, unless something was compiled or the body fails."""
        compilations, start_s = self.num_compilations, time.perf_counter()
        yield
        if compilations == self.num_compilations:
            pace.add(units, time.perf_counter() - start_s)

    @property
    def num_compilations(self) -> int:
        """Number of compilations so far."""
        return 0

    def put(self, entries: Mapping[str, Entry], began: int) -> list[str]:
        """Store entries; return the keys that are stored. Store errors are tolerated.

        Args:
            entries: entries by key.
            began: ``clears.number`` when the request began; what a later ``clear`` dropped is not stored.
        """
        stored = []
        with self.tolerating_store_errors():
            for key, entry in entries.items():
                if self.clears.covers(key, began):
                    continue
                if not self.store.put(key, entry):
                    self.unstorable.add(key)
                elif not self.drop_if_cleared([key], began):
                    stored.append(key)
        return stored

    def drop_if_cleared(self, keys: Sequence[str], began: int) -> bool:
        """Drop entries that were stored while ``clear`` dropped their keys; return True if it did.

        Args:
            keys: their keys, which match the same selections.
            began: see ``put``.

        Raises:
            StoreError: the store failed.
        """
        if not self.clears.covers(keys[0], began):
            return False
        for key in keys:
            self.store.clear(Selection(key=key))
        return True

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
    return CallSettings(get_policy(options.policy), options.budget, profile, options.salt)
