"""Runs one decoder graph: spans -> lookup -> policy -> plan -> run -> admit."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.capture.mutations import can_write, deliver
from vlcache_fx.errors import (
    NotReused,
    PlanError,
    PolicyError,
    Reason,
    UnreadableWeightsError,
    UnsupportedGraphError,
)
from vlcache_fx.ir import Captured
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.build import RowChooser, build_plan
from vlcache_fx.plan.types import Plan
from vlcache_fx.policies.base import Policy, ProbingPolicy
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.donors import tables as donors
from vlcache_fx.runtime.donors.index import DonorLookup
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.form import DecoderForm
from vlcache_fx.runtime.guards.shadow import Comparison, compare, compared_rows, find_logits
from vlcache_fx.runtime.programs.probe import ChosenRows, first_chooser, measure, needs_probe
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.report import Report, one_line, why_cold
from vlcache_fx.runtime.requests.host_inputs import on_host
from vlcache_fx.runtime.requests.masks import MaskCheck
from vlcache_fx.runtime.requests.request import Request, together

CANNOT_WRITE = "an input that is written to shares memory with another, or is not contiguous"
MISMATCH = "placeholders and encoder features do not agree in number or width"
TOO_FEW_ROWS = "results are made of less than two tokens, in a graph for any number of them"
NO_PLAN = "the policy's rows make no plan"
NOT_COMPILED = "the rewritten graph did not compile"


class DecoderRunner:
    """A decoder with reuse: call it with the graph's inputs, get the graph's outputs.

    Args:
        form: facts of the graph.
        masks: what its attention masks let tokens see.
        cold, warm: its programs; lowered when first used.
        engine: what it shares with the model's other graphs.
        unmodified: computes the graph's results without reuse; serves every call that reuse cannot.
        logits: index of the result that shadow runs compare; None without them.
    """

    def __init__(
        self,
        form: DecoderForm,
        masks: MaskCheck,
        cold: ProgramRunner,
        warm: ProgramRunner,
        engine: Engine,
        unmodified: Callable[..., Sequence[Any]],
        logits: int | None = None,
    ) -> None:
        self.engine = engine
        self._form, self._masks, self._cold, self._warm = form, masks, cold, warm
        self._in_place = tuple({*cold.in_place, *warm.in_place})
        self._unmodified, self._logits = unmodified, logits
        self._donors = DonorLookup(form, engine)

    @classmethod
    def of(
        cls, captured: Captured, engine: Engine, unmodified: Callable[..., Sequence[Any]]
    ) -> "DecoderRunner":
        """Of a captured graph whose encoder features are inputs. Both programs are built at once.

        Raises:
            UnsupportedGraphError: the graph cannot be rewritten.
        """
        facts = analyze(captured)
        masks = MaskCheck.of(captured, facts)
        cold, warm = cold_program(captured), warm_program(captured)
        form = DecoderForm.of(captured, facts, cold.recorded)
        return cls(
            form,
            masks,
            ProgramRunner.of("cold", cold, form.device, engine),
            ProgramRunner.of("warm", warm, form.device, engine),
            engine,
            unmodified,
            _logits_to_shadow(captured, facts, engine),
        )

    def __call__(self, args: Sequence[Any], *, encoder_hit: bool | None = None) -> Sequence[Any]:
        """Run one request. Never fails for reasons of reuse: what goes wrong there costs only the reuse."""
        noted, items = self.engine.take_encoder_note(), self.engine.take_items()
        identifier, clock = self._form.identifier, Clock()
        with clock.measure("identify"):
            known = on_host(args, self._form.tells)
            identified = identifier.runs(known, items)
            if identified is None:
                return self._bypass(args, MISMATCH, NotReused.MISMATCH)
            num_samples, num_tokens, runs = identified
            hit = noted if encoder_hit is None else encoder_hit
            try:
                request = self._donors.request(args, known, num_samples, num_tokens, runs, hit, clock)
            except UnreadableWeightsError as error:
                text = self.engine.refuse_weights(error)
                return self._bypass(args, text, Reason.WEIGHTS_UNREADABLE, num_tokens)
        if not runs and identifier.embeddings is not None:
            return self._bypass(args, "no span is marked", NotReused.NO_SPAN, num_tokens)
        if num_tokens < 2:
            return self._bypass(args, "a sequence of one token", NotReused.ONE_TOKEN, num_tokens)
        request = replace(request, positions=self._form.positions(num_tokens, known))
        if request.positions is not None and len(request.positions) < 2 and self._form.tail_varies:
            # Programs take sizes below two as special.
            return self._bypass(args, TOO_FEW_ROWS, NotReused.TOO_FEW_ROWS, num_tokens)
        if not can_write(self._form.writes, self._in_place, args, self._form.data):
            return self._bypass(args, CANNOT_WRITE, NotReused.CANNOT_WRITE, num_tokens)
        reason = self.engine.guards.reason(request.model_fingerprint) if request.spans else None
        if reason is not None:
            return self._bypass(args, reason, NotReused.GUARDED, num_tokens)
        if request.spans:
            look = self._masks.look(args, known, num_tokens, [sample.spans for sample in request.samples])
            if look.refusal is not None:
                self.engine.refuse_call(look.refusal)
                return self._bypass(args, str(look.refusal), look.refusal.reason, num_tokens)
            samples = [
                replace(sample, unseen=unseen if num_samples > 1 else None)
                for sample, unseen in zip(request.samples, look.unseen, strict=True)
            ]
            request = replace(
                request,
                samples=tuple(samples),
                is_causal=look.hides_what_follows,
                is_whole=look.hides_the_past,
            )
            with clock.measure("identify"):
                request = self._donors.with_keys(request, look)
        with clock.measure("lookup"):
            request = self._donors.find(request)
        return self._run_warm(request) if request.donors else self._run_cold(request)

    def _run_cold(self, request: Request) -> Sequence[Any]:
        request = request.without_donors()
        plans = self._plans(request)
        if plans is None:
            return self._bypass(request.args, NO_PLAN, NotReused.NO_PLAN, request.num_tokens)
        if not self._cold.ready():
            return self._bypass(request.args, NOT_COMPILED, NotReused.PROGRAM_FAILED, request.num_tokens)
        bound = self._cold.bind(together(plans), request.positions, dict)
        with request.clock.measure("run"):
            results = self._cold.run(request.args, bound)
        if results is None:
            return self._bypass(
                request.args, "the cold program failed", NotReused.PROGRAM_FAILED, request.num_tokens
            )
        if request.spans:
            self._admit(request, self._cold.recorded, results, plans)
            reason, code = why_cold([span.miss for span in request.found if span.miss is not None])
            self.engine.report(request.report("cold", reason, plans, 1.0, code))
        else:
            report = request.report("bypass", "no media span", plans, 1.0, NotReused.NO_SPAN)
            self.engine.report(report, continues=self._form.goes_on)
        return deliver(self._form.writes, request.args, results, self._form.num_results)

    def _admit(
        self, request: Request, slots: Sequence[str], results: Sequence[Any], plans: Sequence[Plan]
    ) -> None:
        recorded = dict(zip(slots, results[self._form.num_outputs :], strict=True))
        with request.clock.measure("admit"):
            self._donors.admit(request, recorded, plans)

    def _run_warm(self, request: Request) -> Sequence[Any]:
        plans = self._plans(request)
        if plans is None:
            return self._bypass(request.args, NO_PLAN, NotReused.NO_PLAN, request.num_tokens)
        if not self._warm.ready():
            return self._bypass(request.args, NOT_COMPILED, NotReused.PROGRAM_FAILED, request.num_tokens)
        positions = request.positions
        tables = functools.cache(lambda: donors.tables(request.donors, self._form.rows, self._form.device))
        policy = self.engine.choices.now.policy
        if needs_probe(policy, request):
            with request.clock.measure("probe"):
                found = measure(policy, self._warm, request, plans, tables, self._form.rows, positions)
            if found is None:
                return self._bypass(
                    request.args, "the warm program failed", NotReused.PROGRAM_FAILED, request.num_tokens
                )
            plans = self._plans(request, ChosenRows(policy, found))
            if plans is None:
                return self._bypass(request.args, NO_PLAN, NotReused.NO_PLAN, request.num_tokens)
        with request.clock.measure("bind"):
            bound = self._warm.bind(together(plans), positions, tables)
        with request.clock.measure("run"):
            results = self._warm.run(request.args, bound)
        if results is None:
            return self._bypass(
                request.args, "the warm program failed", NotReused.PROGRAM_FAILED, request.num_tokens
            )
        shadow = self._shadow(request, results)
        if shadow is None and any(sample.reuse_is_exact for sample in request.samples):
            self._admit(request, self._warm.recorded, results, plans)
        report = request.report("warm", None, plans, request.computed_share(plans))
        if shadow is not None:
            results, comparison = shadow
            report = replace(report, shadow_kl=comparison.kl)
            self.engine.guards.record(request.model_fingerprint, comparison)
        self.engine.report(report)
        return deliver(self._form.writes, request.args, results, self._form.num_results)

    def _shadow(self, request: Request, reused: Sequence[Any]) -> tuple[Sequence[Any], Comparison] | None:
        """The exact results of a warm request that is due, and how far ``reused`` ones are from their logits.

        What it computes is stored like a cold run's, so donors refine. Reuse of known prefixes alone needs no
        check.
        """
        if self._logits is None or all(sample.reuse_is_exact for sample in request.samples):
            return None
        if not self.engine.guards.is_due(request.model_fingerprint):
            return None
        with request.clock.measure("shadow"):
            full = replace(request.without_donors(), clock=Clock())
            plans = self._plans(full)
            if plans is None or not self._cold.ready():
                return None
            positions = request.positions
            exact = self._cold.run(full.args, self._cold.bind(together(plans), positions, dict))
            if exact is None:
                return None
            num_rows = exact[self._logits][..., 0].numel() // len(request.samples)
            rows, last = compared_rows(request, positions, num_rows)
            comparison = compare(exact[self._logits], reused[self._logits], rows, last)
            self._admit(full, self._cold.recorded, exact, plans)
        return exact, comparison

    def _plans(self, request: Request, chooser: RowChooser | None = None) -> list[Plan] | None:
        """A plan per sample, or None where none can be made (raised in strict mode).

        Without a ``chooser`` the policy is asked, or for the rows of its probe.
        """
        strict = self.engine.options.strict
        choice = self.engine.choices.now
        chooser = chooser or first_chooser(choice.policy, self._form.rows)
        plans: list[Plan] = []
        first_donor = 0
        with request.clock.measure("plan"):
            try:
                self._check_groups(choice.policy)
                profile = self.engine.choices.profile_for(
                    request.model_fingerprint, self._form.dtype, strict=strict
                )
                for sample in request.samples:
                    plans.append(
                        build_plan(
                            num_tokens=request.num_tokens,
                            spans=sample.spans,
                            num_layers=self._form.num_layers,
                            policy=chooser,
                            profile=profile,
                            budget=choice.budget,
                            output_rows=request.positions,
                            strict=strict,
                            prefix=sample.prefix,
                            padding=sample.unseen if request.donors else None,
                            first_donor=first_donor,
                            groups=self._form.groups,
                        )
                    )
                    first_donor += sum(donors.length_of(entry) for entry in sample.donors)
            except (PlanError, PolicyError) as error:
                if strict:
                    raise
                self.engine.plan_failed(error)
                return None
        return plans

    def _check_groups(self, policy: Policy) -> None:
        if isinstance(policy, ProbingPolicy) and any(count > 1 for count in self._form.groups):
            raise PlanError(
                f"policy {policy.name!r} needs rows of its own in every layer; these programs share rows in "
                f"groups of {list(self._form.groups)} layers: make them with this policy"
            )

    def _bypass(
        self, args: Sequence[Any], reason: str, code: Reason | NotReused, num_tokens: int = 0
    ) -> Sequence[Any]:
        continues = self._form.goes_on and code in (NotReused.NO_SPAN, NotReused.ONE_TOKEN)
        report = Report("bypass", one_line(reason), num_tokens, reason_code=code)
        self.engine.report(report, continues=continues)
        return self._unmodified(*args)


def _logits_to_shadow(captured: Captured, facts: DecoderFacts, engine: Engine) -> int | None:
    """The result that shadow runs compare; None without the option, or where there is none."""
    if not engine.options.shadow:
        return None
    try:
        return find_logits(captured, facts)
    except UnsupportedGraphError as refusal:
        engine.refuse_shadow(refusal)
        return None
