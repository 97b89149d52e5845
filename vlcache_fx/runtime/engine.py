"""The engine as its users hold it: reports, statistics, explanations, settings."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError, StoreClosedError, StoreError
from vlcache_fx.options import Options
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.runtime.report import ReportView
from vlcache_fx.runtime.settings import CallSettings
from vlcache_fx.runtime.state import ServingState

if TYPE_CHECKING:
    from vlcache_fx.compiler.explanation import GraphExplanation

EXPLANATION = "_vlcache_explanation"
"""The attribute of a compiled ``forward`` that explains its graphs."""


class ServingEngine(ServingState):
    """Store, policy, reports and counts of one model. Safe to share between threads.

    Sessions of exported graphs have this one; what is compiled in this process has an ``Engine``.

    Args:
        options: checked options.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._explained: weakref.ref[Callable[..., Any]] | None = None

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
            self.pending.take()

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
        before = self.settings.current
        given = {"policy": policy, "budget": budget}
        options = Options.parse({name: value for name, value in given.items() if value is not None})
        settings = CallSettings(
            before.policy if policy is None else get_policy(options.policy),
            before.budget if budget is None else options.budget,
            before.profile if profile is None else profile,
        )
        with self.settings.using(settings):
            yield

    def set_budget(self, budget: float) -> None:
        """Use another budget from now on, for all models of this engine; nothing is compiled anew.

        Raises:
            OptionError: as for the option.
        """
        self.options = replace(self.options, budget=budget)
        self.settings.default = replace(self.settings.default, budget=self.options.budget)

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
