"""Runs one decoder graph: spans -> lookup -> policy -> plan -> run -> admit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.token_axis import shape_of
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.errors import PlanError, UnsupportedGraphError
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime import donors
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.identify import Identifier, Run, arithmetic, donor_key
from vlcache_fx.runtime.mask_check import MaskCheck
from vlcache_fx.runtime.program import ProgramRunner
from vlcache_fx.runtime.report import Mode, Report, SpanReport
from vlcache_fx.store.entry import Entry


@dataclass(frozen=True)
class Request:
    """One call: the graph's inputs, what was found in them, and the times so far."""

    args: Sequence[Any]
    num_tokens: int
    spans: tuple[Span, ...]
    encoder_hit: bool | None
    clock: Clock = field(default_factory=Clock)


class DecoderRunner:
    """A compiled decoder graph: call it with the graph's inputs, get the graph's outputs.

    Both programs are built at once (a graph that cannot be rewritten is refused here) and lowered when first
    used.

    Args:
        captured: the decoder; encoder features are inputs.
        engine: what it shares with the model's other graphs.
        unmodified: runs the graph as it was captured; serves every call that reuse cannot.

    Raises:
        UnsupportedGraphError: the graph cannot be rewritten.
    """

    def __init__(self, captured: Captured, engine: Engine, unmodified: Callable[..., Sequence[Any]]) -> None:
        self.engine = engine
        self._unmodified = unmodified
        facts = analyze(captured)
        data = [index for index, kind in enumerate(captured.kinds) if kind is InputKind.DATA]
        place = {node: index for index, node in enumerate(captured.placeholders)}
        self._identifier = Identifier.of(captured.graph_module, facts, data)
        self._mask_check: MaskCheck | None = MaskCheck(captured.graph_module, facts)
        self._refused: UnsupportedGraphError | None = None
        self._weights = tuple(place[node] for node in facts.weights)
        self._num_layers, self._tail_rows = facts.num_layers, facts.tail_rows
        self._num_outputs = captured.num_outputs
        self._device = facts.stream.boundaries[0].meta["val"].device
        self._cold = ProgramRunner("cold", cold_program(captured), self._device, engine)
        self._warm = ProgramRunner("warm", warm_program(captured), self._device, engine)
        frontiers = {"residual": (facts.stream.boundaries[-1], facts.tail_rows.axis)}
        for index, layer in enumerate(facts.layers):
            for letter, node in (("k", layer.key_frontier), ("v", layer.value_frontier)):
                frontiers[f"{index}.{letter}"] = (node, facts.steps[node].axis)
        self._forms = {
            slot: donors.RowForm.of(frontiers[slot][0].meta["val"], frontiers[slot][1])
            for slot in self._cold.recorded
        }
        # What a stored row looks like, and what layers do beside weights: graphs of one model agree on it.
        rows = {slot: frontiers[slot][0] for slot in self._cold.recorded if slot != "residual"}
        self._form = str(
            (
                [(slot, str(node.meta["val"].dtype), str(shape_of(node)[-1])) for slot, node in rows.items()],
                [layer.site.scale for layer in facts.layers],
                arithmetic(node for members in facts.stream.members for node in members),
            )
        )

    def __call__(self, args: Sequence[Any], *, encoder_hit: bool | None = None) -> Sequence[Any]:
        """Run one request. Never fails for reasons of reuse: what goes wrong there costs only the reuse."""
        noted = self.engine.take_encoder_note()
        clock = Clock()
        with clock.measure("identify"):
            identified = self._identifier.runs(args)
            if identified is None:
                return self._bypass(args, "placeholders and encoder features do not agree in number or width")
            num_tokens, runs = identified
            spans = self._spans(args, runs, num_tokens)
        if not runs and self._identifier.embeddings is not None:
            return self._bypass(args, "no span is marked", num_tokens)
        if num_tokens < 2:
            return self._bypass(args, "a sequence of one token", num_tokens)
        self._check_masks(args, spans)
        if self._refused is not None:
            return self._bypass(args, str(self._refused), num_tokens)
        with clock.measure("lookup"):
            spans, entries = self._look_up(spans)
        hit = noted if encoder_hit is None else encoder_hit
        request = Request(args, num_tokens, tuple(spans), hit, clock)
        if not entries or self._is_worth_recording(spans):
            return self._run_cold(request)
        return self._run_warm(request, entries)

    def _spans(self, args: Sequence[Any], runs: list[Run], num_tokens: int) -> list[Span]:
        runs = [run for run in runs if run.length >= self.engine.options.min_span_tokens]
        if not runs:
            return []  # text alone: nothing to look the weights over for
        weights = self.engine.weights_fingerprint([args[index] for index in self._weights])
        salt = self.engine.options.salt
        spans = []
        for run in runs:
            positions = self._identifier.positions(args, run, num_tokens)
            key = donor_key(run, positions, f"{weights}|{self._form}", salt)
            spans.append(Span(0, run.start, run.length, key, False))
        return spans

    def _look_up(self, spans: list[Span]) -> tuple[list[Span], list[Entry]]:
        looked, entries = [], []
        for span in spans:
            entry = None
            with self.engine.tolerating_store_errors():
                entry = self.engine.store.get(span.key)
            if entry is not None and donors.fits(entry, self._forms, span.length):
                entries.append(entry)
                looked.append(replace(span, hit=True, tier=self.engine.store.tier))
            else:
                looked.append(span)
        return looked, entries

    def _is_worth_recording(self, spans: list[Span]) -> bool:
        """True where an item has missed for the second time: it recurs, so an exact run is worth its donor.

        In a warm run it could not be recorded: it attends to approximate rows before it, and approximate rows
        are never stored.
        """
        missed = [span.key for span in spans if not span.hit and not self.engine.is_unstorable(span.key)]
        repeated = [self.engine.missed_before(key) for key in missed]
        return any(repeated)

    def _check_masks(self, args: Sequence[Any], spans: list[Span]) -> None:
        """Once per graph, with the first call that has spans."""
        if self._mask_check is None or not spans:
            return
        check, self._mask_check = self._mask_check, None
        try:
            check.require_causal(args, spans)
        except UnsupportedGraphError as refusal:
            self._refused = refusal
            self.engine.refuse(refusal)

    def _run_cold(self, request: Request) -> Sequence[Any]:
        spans = tuple(replace(span, hit=False, tier=None) for span in request.spans)
        plan = self._plan(request, ())
        if plan is None or not self._cold.ready():
            return self._bypass(request.args, "the rewritten graph did not compile", request.num_tokens)
        bound = self._cold.bind(plan, self._tail_rows.positions(request.num_tokens), {})
        with request.clock.measure("run"):
            results = self._cold.run(request.args, bound)
        if results is None:
            return self._bypass(request.args, "the cold program failed", request.num_tokens)
        recorded = dict(zip(self._cold.recorded, results[self._num_outputs :], strict=True))
        with request.clock.measure("admit"):
            for span in spans:
                with self.engine.tolerating_store_errors():
                    if not donors.admit(self.engine.store, span, recorded, self._forms):
                        self.engine.note_unstorable(span.key)
        if spans:
            self._report("cold", "no donor for its spans", replace(request, spans=spans), plan, 1.0)
        else:
            self._report("bypass", "no media span", request, plan, 1.0)
        return results[: self._num_outputs]

    def _run_warm(self, request: Request, entries: list[Entry]) -> Sequence[Any]:
        plan = self._plan(request, request.spans)
        if plan is None:
            return self._bypass(request.args, "the policy's rows make no plan", request.num_tokens)
        if not self._warm.ready():
            return self._bypass(request.args, "the rewritten graph did not compile", request.num_tokens)
        with request.clock.measure("bind"):
            tables = donors.tables(entries, self._forms, self._device)
            bound = self._warm.bind(plan, self._tail_rows.positions(request.num_tokens), tables)
        with request.clock.measure("run"):
            results = self._warm.run(request.args, bound)
        if results is None:
            return self._bypass(request.args, "the warm program failed", request.num_tokens)
        self._report("warm", None, request, plan, plan.token_layer_fraction)
        return results[: self._num_outputs]

    def _plan(self, request: Request, spans: Sequence[Span]) -> Plan | None:
        """The plan, or None where none can be made (raised in strict mode)."""
        strict = self.engine.options.strict
        policy, budget = self.engine.choice()
        with request.clock.measure("plan"):
            try:
                return build_plan(
                    num_tokens=request.num_tokens,
                    spans=spans,
                    num_layers=self._num_layers,
                    policy=policy,
                    profile=self.engine.profile,
                    budget=budget,
                    output_rows=self._tail_rows.positions(request.num_tokens),
                    strict=strict,
                )
            except PlanError as error:
                if strict:
                    raise
                self.engine.plan_failed(error)
                return None

    def _bypass(self, args: Sequence[Any], reason: str, num_tokens: int = 0) -> Sequence[Any]:
        self.engine.report(Report("bypass", reason, num_tokens))
        return self._unmodified(*args)

    def _report(self, mode: Mode, reason: str | None, request: Request, plan: Plan, fraction: float) -> None:
        self.engine.report(
            Report(
                mode=mode,
                reason=reason,
                num_tokens=request.num_tokens,
                spans=tuple(SpanReport(s.start, s.length, s.key, s.hit, s.tier) for s in request.spans),
                rows_per_layer=plan.rows_per_layer,
                token_layer_fraction=fraction,
                encoder_hit=request.encoder_hit,
                timings_ms=dict(request.clock.elapsed_ms),
                explanations=plan.explanations,
            )
        )
