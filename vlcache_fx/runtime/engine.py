"""The engine: what the graphs of one model share while they serve."""

import itertools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import (
    OptionError,
    PlanError,
    PolicyError,
    Reason,
    StoreClosedError,
    StoreError,
    UnreadableWeightsError,
    UnsupportedGraphError,
)
from vlcache_fx.options import Options
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.runtime.donors.recent_keys import Fingerprints, RecentContents, RecentKeys
from vlcache_fx.runtime.guards.guards import Guards
from vlcache_fx.runtime.report import Report, ReportView, one_line
from vlcache_fx.runtime.settings import Choice, Choices
from vlcache_fx.store import open_store

if TYPE_CHECKING:
    from vlcache_fx.explain import GraphExplanation

log = logging.getLogger("vlcache_fx")

EXPLANATION = "_vlcache_explanation"
"""The attribute of a compiled ``forward`` that explains its graphs."""


class ServingEngine:
    """Store, policy, reports and counts of one model. Safe to share between threads.

    Sessions of exported graphs have this one; what is compiled in this process has an ``Engine``.

    Args:
        options: checked options.

    Attributes:
        choices: policy, budget and profile of the next call.
        guards: which models go without reuse.
        fingerprints: of weights.
        graphs: of one model, as compiled; by number. They live as long as the engine.
        contents: what items held that were looked up lately, and with which weights.
        missed: keys of items that were looked up in vain.
        unstorable: keys of donors that the store refused, as too large: recording them again would not help.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.choices = Choices(_choice(self.options))
        self.store = open_store(self.options.store, self.options.capacity_bytes)
        self.guards = Guards(self.options)
        self.refusals: list[UnsupportedGraphError] = []
        self.graphs: dict[int, Callable[..., Sequence[Any]]] = {}
        self.graph_numbers = itertools.count()
        self._explained: weakref.ref[Callable[..., Any]] | None = None
        self._closed = self._said_closed = False
        self._report: Report | None = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.fingerprints = Fingerprints()
        self.missed, self.unstorable = RecentKeys(), RecentKeys()
        self.contents = RecentContents()
        self._call = threading.local()

    @property
    def last_report(self) -> ReportView | None:
        """What the last prefill did, as plain data with attributes; None before the first call.

        Calls that go on behind a prefill without media of their own (drafts that are checked, further chunks
        of a prompt) are counted, but leave its report.
        """
        report = self._report
        return None if report is None else report.as_view()

    @property
    def explained(self) -> Callable[..., Any] | None:
        """The model's own ``forward``; None for an engine of many models, and once the model is gone."""
        forward = None if self._explained is None else self._explained()
        return getattr(forward, "__wrapped__", None)

    def explains(
        self,
        forward: Callable[..., Any],
        explanation: Callable[[dict[str, Any]], "tuple[GraphExplanation, ...]"],
    ) -> None:
        """The model's ``forward`` as it was compiled, which wraps its own. It is not kept alive.

        Args:
            forward: owns ``explanation``, which knows the model.
            explanation: of its graphs, for the keyword arguments of a call.
        """
        setattr(forward, EXPLANATION, explanation)
        self._explained = weakref.ref(forward)

    def stats(self) -> dict[str, Any]:
        """Counts since the start: calls per mode, store, compilations, refusals by reason, shadow runs."""
        with self._lock:
            counts = dict(self._counts)
        store = self.store.stats()
        return {
            "calls": {mode: counts.get(mode, 0) for mode in ("cold", "warm", "bypass")},
            "encoder": {"hits": counts.get("encoder_hits", 0), "misses": counts.get("encoder_misses", 0)},
            "uncompiled_calls": counts.get("uncompiled_calls", 0),
            "plan_failures": counts.get("plan_failures", 0),
            "store_failures": counts.get("store_failures", 0),
            "store": {name: getattr(store, name) for name in store.__dataclass_fields__},
            "compilations": 0,
            "compile_seconds": 0.0,
            "refusals": dict(Counter(str(refusal.reason) for refusal in self.refusals)),
            "shadow": self.guards.stats(),
        }

    def explain(self, **inputs: Any) -> "tuple[GraphExplanation, ...]":
        """How the graphs of ``model(**inputs)`` are rewritten, and why not where they are not.

        Raises:
            OptionError: the engine does not belong to one model (``torch.compile`` engines serve many), or
                the model is gone.
        """
        forward = None if self._explained is None else self._explained()
        if forward is None:
            raise OptionError(
                "this engine knows no model to explain; compile the model with vlcache_fx.compile"
            )
        try:
            found: tuple[GraphExplanation, ...] = getattr(forward, EXPLANATION)(inputs)
            return found
        finally:  # no word of it in the report of the next call
            self.take_encoder_note()
            self.take_items()

    @contextmanager
    def using(
        self,
        *,
        policy: str | Policy | None = None,
        budget: float | None = None,
        profile: Profile | None = None,
    ) -> Iterator[None]:
        """Calls that this thread makes in the body use another policy, budget or profile.

        Nothing is compiled anew.

        Raises:
            OptionError, PolicyError: as for the options of these names.
        """
        before = self.choices.now
        given = {"policy": policy, "budget": budget}
        options = Options.parse({name: value for name, value in given.items() if value is not None})
        choice = Choice(
            before.policy if policy is None else get_policy(options.policy),
            before.budget if budget is None else options.budget,
            before.profile if profile is None else profile,
        )
        with self.choices.using(choice):
            yield

    def set_budget(self, budget: float) -> None:
        """Use another budget from now on, for all models of this engine; nothing is compiled anew.

        Raises:
            OptionError: as for the option.
        """
        self.options = replace(self.options, budget=budget)
        self.choices.default = replace(self.choices.default, budget=self.options.budget)

    def resume(self) -> None:
        """Lift what shadow runs or the gate decided: every model of this engine reuses again.

        Violations are counted anew. Donors are as they were: those of a model that went without reuse are
        still there, unless they were evicted meanwhile.
        """
        self.guards.resume()

    def clear(self) -> None:
        """Drop every donor and encoder output. Of a closed engine, there are none."""
        try:
            self.store.clear()
        except StoreError as error:
            if not (self._closed or isinstance(error, StoreClosedError)):
                raise
        self.missed.clear()
        self.unstorable.clear()
        self.contents.clear()

    def close(self) -> None:
        """Release the store; the compiled model goes on without reuse. Again: nothing happens."""
        self._closed = True
        self.store.close()

    # The methods below are for the runtime, and for measurements.

    @property
    def graph_calls(self) -> int:
        """Calls of compiled graphs that this thread has made."""
        return int(getattr(self._call, "graphs", 0))

    def note_graph_call(self) -> None:
        """A compiled graph is called."""
        self._call.graphs = self.graph_calls + 1

    def set_options(self, options: Options) -> None:
        """Other options from now on; store and lowering stay what they are."""
        self.options, self.choices.default = options, _choice(options)

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

    def note_encoder(self, *, hit: bool) -> None:
        """An encoder outside the decoder's graph was skipped (or ran); the call's report will say so."""
        self._call.encoder_hit = hit
        self.count("encoder_hits" if hit else "encoder_misses")

    def take_encoder_note(self) -> bool | None:
        """What ``note_encoder`` said since the last prefill of this thread."""
        hit: bool | None = getattr(self._call, "encoder_hit", None)
        self._call.encoder_hit = None
        return hit

    def note_items(self, modality: str, lengths: Sequence[int]) -> None:
        """Rows of features of each item that was encoded: the next prefill tells items apart by them."""
        items: dict[str, tuple[int, ...]] = getattr(self._call, "items", {})
        self._call.items = {**items, modality: tuple(lengths)}

    def take_items(self) -> list[tuple[int, ...]]:
        """What ``note_items`` said since the last prefill of this thread."""
        items: dict[str, tuple[int, ...]] = getattr(self._call, "items", {})
        self._call.items = {}
        return list(items.values())

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


def _choice(options: Options) -> Choice:
    profile = None if options.profile is None else Profile.load(options.profile)
    return Choice(get_policy(options.policy), options.budget, profile)
