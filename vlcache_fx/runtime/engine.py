"""The engine's public part: reports, statistics, explanations, settings."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError, StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.options import Options
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.runtime.collected import CollectedReports
from vlcache_fx.runtime.donors.explain_miss import MissExplanation, explain_key, explain_spans
from vlcache_fx.runtime.donors.refine import exact_key
from vlcache_fx.runtime.report import Report, ReportView
from vlcache_fx.runtime.settings import CallSettings
from vlcache_fx.runtime.state import ServingState

if TYPE_CHECKING:
    from vlcache_fx.explaining.explanation import Explanation

EXPLANATION = "_vlcache_explanation"
"""Attribute of a compiled ``forward`` with the function that explains its graphs."""


class ServingEngine(ServingState):
    """Store, policy, reports and counts of one model. Safe to share between threads.

    For sessions of exported graphs; models compiled in this process have its subclass ``Engine``.

    Args:
        options: checked options.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._explained: weakref.ref[Callable[..., Any]] | None = None

    def __repr__(self) -> str:
        with self._lock:
            calls = ", ".join(f"{self._counts[mode]} {mode}" for mode in ("cold", "warm", "bypass"))
        policy, budget = self.settings.current.policy, self.settings.current.budget
        return (
            f"<{type(self).__name__} policy={policy!r} budget={budget:g} store={self.store!r} calls: {calls}>"
        )

    @property
    def last_report(self) -> ReportView | None:
        """Report of this thread's last prefill, as plain data with attributes; None before its first call.

        Tasks of asyncio have a last report each. A call in another thread, ``asyncio.to_thread`` included,
        is not the caller's: take ``reports()``. Calls without media that continue its prompt (drafts that
        are verified, further chunks) are counted, but do not replace its report.
        """
        report = self._reports.last
        return None if report is None else report.as_view()

    def reports(self) -> AbstractContextManager[CollectedReports]:
        """Return a context manager that collects the reports of the calls in its body.

        Its value is a sequence of reports, in the order in which the calls end. It has those of this thread
        or task, and of what begins in the body with a copy of its context: tasks of asyncio,
        ``asyncio.to_thread``, ``contextvars.copy_context().run``. A plain thread or executor does not: open
        another one there. Calls that continue a prompt are left out, as in ``last_report``.

        ::

            with model.vlcache.reports() as reports:
                await asyncio.to_thread(model.generate, **inputs)
            reports[0].mode
        """
        return self._reports.collect()

    @property
    def explained(self) -> Callable[..., Any] | None:
        """The model's original ``forward``; None for an engine of many models, or if the model is gone."""
        forward = None if self._explained is None else self._explained()
        return getattr(forward, "__wrapped__", None)

    def explains(
        self,
        forward: Callable[..., Any],
        explanation: Callable[[dict[str, Any]], "Explanation"],
    ) -> None:
        """Set the model's compiled ``forward``. The engine keeps only a weak reference.

        Args:
            forward: wraps the original ``forward``, and owns ``explanation``.
            explanation: explains a call, given its keyword arguments.
        """
        setattr(forward, EXPLANATION, explanation)
        self._explained = weakref.ref(forward)

    def stats(self) -> dict[str, Any]:
        """Return counts since the start, as JSON data; see ``docs/metrics.md``.

        Calls by mode and reason, spans that hit by tier and missed by reason, tokens reused and recomputed,
        seconds saved, store, compilations, refusals, shadow runs.
        """
        with self._lock:
            counts, usage = dict(self._counts), self._usage.stats()
        store = self.store.stats()
        return {
            "calls": {mode: counts.get(mode, 0) for mode in ("cold", "warm", "bypass")},
            "encoder": {"hits": counts.get("encoder_hits", 0), "misses": counts.get("encoder_misses", 0)},
            "uncompiled_calls": counts.get("uncompiled_calls", 0),
            "plan_failures": counts.get("plan_failures", 0),
            "store_failures": counts.get("store_failures", 0),
            "idle_refinements": counts.get("idle_refinements", 0),
            **usage,
            "budget": self.options.budget,
            "store": asdict(store),
            "compilations": 0,
            "compile_seconds": 0.0,
            "refusals": dict(Counter(str(refusal.reason) for refusal in self.refusals)),
            "shadow": self.guards.stats(),
        }

    def explain_miss(
        self, report: Report | Mapping[str, Any] | None = None, *, key: str | None = None
    ) -> tuple[MissExplanation, ...]:
        """Explain why spans were not reused: the nearest entry and what differs, or when it was evicted.

        For operators: explanations name entries of any salt, reports never do. The listing of every tier is
        read, but no tensor; recent calls are remembered, so that a miss is explained after its item was
        stored.

        Args:
            report: explain each span of this report that missed; by default the last report.
            key: explain this key instead of a report.

        Raises:
            StoreError: the store is closed or cannot be read.
        """
        if key is not None:
            return (explain_key(key, self.store, self.misses),)
        report = self.last_report if report is None else report
        view = report.as_view() if isinstance(report, Report) else report or {"spans": ()}
        return tuple(explain_spans(view["spans"], self.store, self.misses))

    def explain(self, **inputs: Any) -> "Explanation":
        """Explain ``model(**inputs)``: its tokens, rows, times, graphs, donors and misses.

        The call is traced and computed as the next one would be, but no donor is stored, and nothing is
        counted or reported. The result is a sequence of explanations of the graphs: how each is rewritten, or
        why not. It renders itself (``rich.print``, notebooks), and ``save(path)`` writes a page.

        Before the model's first call, nothing is compiled: eager kernels run. A cache in ``inputs`` is
        written to, as in a call.

        Raises:
            OptionError: the engine serves many models, as with ``torch.compile``, or its model is gone.
        """
        forward = None if self._explained is None else self._explained()
        if forward is None:
            raise OptionError(
                "this engine has no model to explain; compile the model with vlcache_fx.compile"
            )
        try:
            found: Explanation = getattr(forward, EXPLANATION)(inputs)
            return found
        finally:  # the next call's report must not include this trace
            self.pending.take()

    @contextmanager
    def using(
        self,
        *,
        policy: str | Policy | None = None,
        budget: float | None = None,
        profile: Profile | None = None,
        salt: str | None = None,
    ) -> Iterator[None]:
        """Use another policy, budget, profile or salt for calls in the body. Nothing is compiled again.

        For calls of this thread or task of asyncio, and of what begins in the body with a copy of its
        context, as for ``reports``. Requests with different salts share nothing: a server passes its tenant.

        Raises:
            OptionError, PolicyError: as for the options of these names.
        """
        before = self.settings.current
        changed = {"policy": policy, "budget": budget, "salt": salt}
        options = Options.parse({name: value for name, value in changed.items() if value is not None})
        settings = CallSettings(
            before.policy if policy is None else get_policy(options.policy),
            before.budget if budget is None else options.budget,
            before.profile if profile is None else profile,
            before.salt if salt is None else options.salt,
        )
        with self.settings.using(settings):
            yield

    def set_budget(self, budget: float) -> None:
        """Use another budget from now on, for all models of this engine. Nothing is compiled again.

        Raises:
            OptionError: as for the option.
        """
        self.options = replace(self.options, budget=budget)
        self.settings.default = replace(self.settings.default, budget=self.options.budget)

    def resume(self) -> None:
        """Turn reuse on again for every model that shadow runs or the gate bypassed.

        Violation counts start at zero. Donors recorded before are still stored, unless evicted.
        """
        self.guards.resume()

    def clear(self, *, salt: str | None = None, model: str | None = None, key: str | None = None) -> int:
        """Drop donors and encoder outputs: those that match everything given, by default all.

        Requests that run keep the donors that they found. What they compute is stored only if they began
        after ``clear``, or if it does not match; this holds for this engine, not for others of its store.

        Args:
            salt: of one tenant, as in ``using(salt=...)``; ``""`` is the salt of requests without one.
            model: a fingerprint of weights: ``model_fingerprint`` of a report for the donors of its decoder.
                Encoder outputs have the fingerprint of their encoder's weights.
            key: the key of a span in a report. All rows of its item are dropped, and nothing else.

        Returns:
            The number of entries that were dropped; 0 on a closed engine.

        Raises:
            OptionError: an argument is not a string.
            StoreError: the store failed.
        """
        given = {"salt": salt, "model": model, "key": key}
        for name, value in given.items():
            if value is not None and not isinstance(value, str):
                raise OptionError(
                    f"clear({name}={value!r}) is not valid: it must be a string, or None for all"
                )
        if all(value is None for value in given.values()):
            return self._clear(None)
        tenant = None if salt is None else self.options.key_salt_of(salt)
        keys = [None] if key is None else dict.fromkeys((key, exact_key(key)))
        return sum(self._clear(Selection(tenant, model, each)) for each in keys)

    def _clear(self, selection: Selection | None) -> int:
        self.clears.add(selection)  # first: a request that stores now must see it
        dropped = 0
        try:
            dropped = self.store.clear(selection)
        except StoreError as error:
            if not (self._closed or isinstance(error, StoreClosedError)):
                raise
        for memory in (self.missed, self.unstorable, self.misses, self.returns):
            memory.clear(selection)
        return dropped

    def close(self) -> None:
        """Release the store; the compiled model continues without reuse. Idempotent."""
        self._closed = True
        self.idle.close()
        self.store.close()
