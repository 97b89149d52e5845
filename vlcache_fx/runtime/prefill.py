"""Serves prefills of one decoder graph: spans -> keys -> lookup -> policy -> plan -> run -> admit."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vlcache_fx.errors import DamagedEntryError, Reason, UnreadableWeightsError
from vlcache_fx.plan.types import Plan
from vlcache_fx.policies.base import Policy
from vlcache_fx.runtime.call_context import CallContext
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.donors import tables as donors
from vlcache_fx.runtime.donors.admission import Admission
from vlcache_fx.runtime.donors.fitting import fitted_donors, fitting_tables
from vlcache_fx.runtime.donors.idle_refiner import IdleRefiner
from vlcache_fx.runtime.donors.index import DonorIndex
from vlcache_fx.runtime.donors.states import state_tables, uses_of
from vlcache_fx.runtime.guards.shadow import Comparison, compare, compared_rows
from vlcache_fx.runtime.mutations import apply_input_mutations, inputs_allow_mutation
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.planner import Planner
from vlcache_fx.runtime.programs.bind import Tables
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.programs.probe import ChosenRows, measure, needs_probe
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.report import Report, one_line, why_cold
from vlcache_fx.runtime.requests.bidirectional import with_whole_media
from vlcache_fx.runtime.requests.host_inputs import on_host
from vlcache_fx.runtime.requests.input_values import InputValues
from vlcache_fx.runtime.requests.keyed import KeyedRequests
from vlcache_fx.runtime.requests.masks import MaskChecker
from vlcache_fx.runtime.requests.prologue import Prologue
from vlcache_fx.runtime.requests.request import Request, stack_if_batched
from vlcache_fx.runtime.requests.spans import Identifier
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec
from vlcache_fx.spec.slots import StoredSlot


class Variants(Protocol):
    """Runners of the variants of a warm program."""

    def packed(self, dtype: torch.dtype, /) -> ProgramRunner:
        """Return the runner for a donor with packed rows of this dtype."""

    def fitted(self) -> ProgramRunner:
        """Return the runner that fits donors of several contexts."""


class DecoderRunner:
    """A decoder with reuse: takes the graph's inputs, returns its results.

    Args:
        spec: spec of the graph.
        prologue: the programs that read a call.
        cold, warm: the two programs; lowered when first used.
        device: device of the token embeddings.
        engine: the state shared by the model's graphs.
        unmodified: computes the graph's results without reuse, for calls that the programs do not serve.
        logits: index of the result that shadow runs compare; None without shadow runs.
        variants: the variants of ``warm``; None without any.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        prologue: Prologue,
        cold: ProgramRunner,
        warm: ProgramRunner,
        device: torch.device,
        engine: ServingState,
        unmodified: Callable[..., Sequence[Any]],
        logits: int | None = None,
        variants: Variants | None = None,
    ) -> None:
        self.engine = engine
        self._spec, self._device, self._cold, self._warm = spec, device, cold, warm
        self._identifier, self._mask_checker = (
            Identifier(spec.spans, prologue.spans),
            MaskChecker(spec.masks, prologue, allows_ranges=not spec.states),
        )
        self._in_place = tuple({*cold.spec.in_place, *warm.spec.in_place})
        self._unmodified, self._logits, self._variants = unmodified, logits, variants
        self._pace = Pace()
        values = InputValues(spec.leaves, prologue.input_values)
        self._requests = KeyedRequests(spec, values, device, engine)
        self._donors = DonorIndex(spec, engine, self._pace)
        self._admission = Admission(spec, engine, self._pace)
        self._planner = Planner(spec, engine)
        self._refiner = IdleRefiner(
            spec,
            engine,
            cold.spec,
            device,
            weights=self._requests.weights,
            compute=self._compute,
            admit=self._admit,
        )

    def __call__(
        self, args: Sequence[Any], context: CallContext | None = None, *, encoder_hit: bool | None = None
    ) -> Sequence[Any]:
        """Run one request. Failures of reuse cost the reuse, never the request.

        Args:
            args: the graph's inputs.
            context: context of the call; by default what encoders noted in this thread.
            encoder_hit: as in ``Report``, for an encoder in the same graph.
        """
        context, clock = context or self.engine.pending.take(), Clock()
        with clock.measure("identify"):
            host_args = on_host(args, self._spec.host_inputs)
            identified = self._identifier.media_spans(host_args, context.media_items, context.media_features)
            if identified is None:
                return self._bypass(args, Reason.MISMATCH)
            num_samples, num_tokens, media_spans = identified
            size = num_samples, num_tokens
            hit = context.encoder_hit if encoder_hit is None else encoder_hit
            try:
                request = self._requests.request(
                    args, host_args, num_samples, num_tokens, media_spans, hit, clock
                )
            except UnreadableWeightsError as error:
                text = self.engine.refuse_weights(error)
                return self._bypass(args, Reason.WEIGHTS_UNREADABLE, size, text)
        if not media_spans and self._spec.spans.embeddings is not None:
            return self._bypass(args, Reason.NO_SPAN, size, "no span is marked")
        if num_tokens < 2:
            return self._bypass(args, Reason.ONE_TOKEN, size)
        request = replace(request, positions=self._spec.positions(num_tokens, host_args))
        if request.positions is not None and len(request.positions) < 2 and self._spec.tail_varies:
            # Dynamo specializes sizes 0 and 1; the programs take two or more.
            return self._bypass(args, Reason.TOO_FEW_ROWS, size)
        if not inputs_allow_mutation(self._spec.writes, self._in_place, args, self._spec.data):
            return self._bypass(args, Reason.CANNOT_WRITE, size)
        if any(args[index].shape[dim] > most for index, dim, most in self._spec.most_inputs):
            return self._bypass(
                args, Reason.MISMATCH, size, "a cache has more inputs of a convolution than it reads"
            )
        reason = self.engine.guards.reason(request.model_fingerprint) if request.spans else None
        if reason is not None:
            return self._bypass(args, Reason.GUARDED, size, reason)
        if request.spans:
            summary = self._mask_checker.check(
                args, host_args, num_tokens, [sample.spans for sample in request.samples]
            )
            if summary.refusal is not None:
                self.engine.refuse_call(summary.refusal)
                return self._bypass(args, summary.refusal.reason, size, str(summary.refusal))
            samples = [
                replace(
                    sample,
                    padding=padding if num_samples > 1 else None,
                    bidirectional=with_whole_media(ranges, sample.media_spans),
                )
                for sample, padding, ranges in zip(
                    request.samples, summary.padding, summary.bidirectional, strict=True
                )
            ]
            request = replace(
                request,
                samples=tuple(samples),
                is_causal=summary.is_causal,
                ignores_past=summary.ignores_past and not self._spec.reads_states,
            )
            with clock.measure("identify"):
                request = self._requests.with_keys(request, summary)
        request = self._find_or_claim(request)
        with request.claim, self.engine.idle.request():
            return self._run_with_donors(request) if request.donors else self._run_cold(request)

    def _find_or_claim(self, request: Request) -> Request:
        """Return the request with its donors. Waits for a request that computes one of them."""

        def find(before: Request | None) -> Request:
            with request.clock.measure("lookup"):
                return self._donors.find(before or request)

        found, claim = self.engine.find_or_claim(find, self._donors.missing)
        if claim.waited_s:
            request.clock.elapsed_ms["wait"] = claim.waited_s * 1e3
        return replace(found, claim=claim)

    def _run_with_donors(self, request: Request) -> Sequence[Any]:
        """Run warm; compute everything if a donor that still arrives turns out damaged."""
        reason = Reason.STORE_FAILED
        with self.engine.tolerating_store_errors():
            try:
                return self._run_warm(request)
            except DamagedEntryError:
                reason = Reason.DAMAGED_ENTRY
                raise
        return self._run_cold(request.with_lost_donors(reason))

    def _run_cold(self, request: Request) -> Sequence[Any]:
        request = request.without_donors()
        for span in request.found:
            if span.miss is Reason.RECOMPUTED_TO_REFINE:
                self.engine.returns.add(span.key)
        plans = self._planner.plans(request)
        if plans is None:
            return self._give_up(request, Reason.NO_PLAN)
        if not self._cold.ready():
            return self._give_up(request, Reason.PROGRAM_FAILED)
        bound = self._cold.bind(stack_if_batched(plans), request.positions, dict)
        num_samples, num_tokens = request.size
        with request.clock.measure("run"), self.engine.timing(self._pace, num_samples * num_tokens):
            results = self._cold.run(request.args, bound)
        if results is None:
            return self._give_up(request, Reason.PROGRAM_FAILED, "the cold program failed")
        if request.spans:
            self._admit(request, self._cold.spec.recorded, results, plans)
            missed = [(span.miss, span.miss_detail) for span in request.found if span.miss is not None]
            reason, code = why_cold([miss for miss, _ in missed], [detail for _, detail in missed])
            self._report(request, plans, request.report("cold", reason, plans, 1.0, code))
        else:
            report = request.report("bypass", Reason.NO_SPAN.text, plans, 1.0, Reason.NO_SPAN)
            self._report(request, plans, report, continues=self._spec.continues_prompts)
        return apply_input_mutations(self._spec.writes, request.args, results, self._spec.num_results)

    def _admit(
        self, request: Request, slots: Sequence[StoredSlot], results: Sequence[Any], plans: Sequence[Plan]
    ) -> None:
        recorded = dict(zip(slots, results[self._spec.num_outputs :], strict=True))
        with request.clock.measure("admit"):
            request.claim.end(self._admission.admit(request, recorded, plans))

    def _run_warm(self, request: Request) -> Sequence[Any]:
        plans = self._planner.plans(request)
        if plans is None:
            return self._give_up(request, Reason.NO_PLAN)
        positions, policy = request.positions, self.engine.settings.current.policy
        program, tables = self._warm_program(request, policy)
        if not program.ready():
            return self._give_up(request, Reason.PROGRAM_FAILED)
        if needs_probe(policy, request):
            with request.clock.measure("probe"):
                found = measure(policy, program, request, plans, tables, self._spec.rows, positions)
            if found is None:
                return self._give_up(request, Reason.PROGRAM_FAILED, "the warm program failed")
            plans = self._planner.plans(request, ChosenRows(policy, found))
            if plans is None:
                return self._give_up(request, Reason.NO_PLAN)
        with request.clock.measure("bind"):
            bound = program.bind(stack_if_batched(plans), positions, tables)
        with request.clock.measure("run"):
            results = program.run(request.args, bound)
        if results is None:
            return self._give_up(request, Reason.PROGRAM_FAILED, "the warm program failed")
        shadow = self._shadow(request, results)
        if shadow is None and any(sample.reuse_is_exact for sample in request.samples):
            self._admit(request, self._warm.spec.recorded, results, plans)
        if shadow is None:
            self._refiner.offer(request)
        report = request.report("warm", None, plans, request.computed_share(plans))
        if shadow is not None:
            results, comparison = shadow
            report = replace(report, shadow_kl=comparison.kl)
            self.engine.guards.record(request.model_fingerprint, comparison)
        self._report(request, plans, report)
        return apply_input_mutations(self._spec.writes, request.args, results, self._spec.num_results)

    def _report(
        self, request: Request, plans: Sequence[Plan], report: Report, *, continues: bool = False
    ) -> None:
        """Report a planned call; ``continues`` as in ``ServingState.report``."""
        self.engine.report(report, continues=continues)
        observations = self.engine.observed.get()
        if observations is not None:
            observations.add(request, plans, report)

    def _warm_program(self, request: Request, policy: Policy) -> tuple[ProgramRunner, Tables]:
        """Return the warm program of a call, and what binds its donors.

        Donors with differences are fitted to recomputed rows. A single packed donor is unpacked by the
        program, unless a probe needs its rows.
        """
        specs, device, variants = self._spec.rows, self._device, self._variants
        tables = functools.cache(lambda: self._tables(request))
        if variants is None:
            return self._warm, tables
        if self.engine.options.donor_rank:
            several = fitted_donors(request, specs)
            if several and variants.fitted().ready():
                inputs = fitting_tables(several, request, specs, device)
                return variants.fitted(), functools.cache(lambda: {**tables(), **inputs})
        if not self._spec.states and not needs_probe(policy, request):
            alone = donors.single_packed(request.donors, specs, device)
            if alone is not None:
                dtype, parts = alone
                program = variants.packed(dtype)
                if program.ready():
                    return program, lambda: parts
        return self._warm, tables

    def _tables(self, request: Request) -> Mapping[Any, Tensor | PendingTensor]:
        rows = donors.tables(request.donors, self._spec.rows, self._device)
        if not self._spec.states:
            return rows
        is_batched = len(request.samples) > 1
        states = state_tables(uses_of(request), self._spec.states, self._device, with_zeros=is_batched)
        return rows | states

    def _shadow(self, request: Request, reused: Sequence[Any]) -> tuple[Sequence[Any], Comparison] | None:
        """Return exact results and the comparison of their logits with ``reused``; None if no run is due.

        Rows of a shadow run are stored like those of a cold run, so donors refine. Reuse of exact prefixes
        needs no check.
        """
        if self._logits is None or all(sample.reuse_is_exact for sample in request.samples):
            return None
        if not self.engine.guards.is_due(request.model_fingerprint):
            return None
        with request.clock.measure("shadow"):
            full = replace(request.without_donors(), clock=Clock())
            found = self._compute(full)
            if found is None:
                return None
            exact, plans = found
            num_rows = exact[self._logits][..., 0].numel() // len(request.samples)
            rows, last = compared_rows(request, request.positions, num_rows)
            comparison = compare(exact[self._logits], reused[self._logits], rows, last)
            self._admit(full, self._cold.spec.recorded, exact, plans)
        return exact, comparison

    def _compute(self, request: Request) -> tuple[Sequence[Any], Sequence[Plan]] | None:
        """Return the cold program's results for a request without donors, and its plans; None if it fails."""
        plans = self._planner.plans(request)
        if plans is None or not self._cold.ready():
            return None
        bound = self._cold.bind(stack_if_batched(plans), request.positions, dict)
        results = self._cold.run(request.args, bound)
        return None if results is None else (results, plans)

    def _give_up(self, request: Request, code: Reason, text: str | None = None) -> Sequence[Any]:
        """Run without reuse after the lookup; requests that wait for this one need not wait for that."""
        request.claim.end()
        return self._bypass(request.args, code, request.size, text)

    def _bypass(
        self, args: Sequence[Any], code: Reason, size: tuple[int, int] = (0, 0), text: str | None = None
    ) -> Sequence[Any]:
        """Run without reuse, and report ``code``.

        Args:
            args: the graph's inputs.
            code: the reason.
            size: number of prompts, and tokens of each; 0 where unknown.
            text: replaces the text of the reason.
        """
        num_samples, num_tokens = size
        continues = self._spec.continues_prompts and code in (Reason.NO_SPAN, Reason.ONE_TOKEN)
        report = Report(
            "bypass", one_line(text or code.text), num_tokens, reason_code=code, num_samples=num_samples
        )
        self.engine.report(report, continues=continues)
        return self._unmodified(*args)
