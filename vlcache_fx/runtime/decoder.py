"""Runs one decoder graph: spans -> lookup -> policy -> plan -> run -> admit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from vlcache_fx.runtime.prefix import Piece, PrefixReader
from vlcache_fx.runtime.program import ProgramRunner
from vlcache_fx.runtime.report import Mode, Report, SpanReport
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.keys import content_digest

LEAST_PREFIX_SHARE = 0.5
"""A known prefix without a reused span is worth the warm program from this share of the prompt on."""


@dataclass(frozen=True)
class Request:
    """One call: the graph's inputs, what was found in them, and the times so far.

    Attributes:
        runs: everything that merges fill.
        spans: the runs that may be reused.
        root: what keys of rows depend on beside the prompt.
        prefix: leading tokens that have exact donors.
    """

    args: Sequence[Any]
    num_tokens: int
    runs: Sequence[Run]
    spans: tuple[Span, ...]
    root: str
    encoder_hit: bool | None
    clock: Clock = field(default_factory=Clock)
    prefix: int = 0

    @property
    def is_exact(self) -> bool:
        """True where all reuse is: every reused span lies in the known prefix."""
        return not any(span.hit and span.start >= self.prefix for span in self.spans)


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
        self._prefixes = PrefixReader.of(captured, facts, self._identifier.features)
        self._mask_check: MaskCheck | None = MaskCheck(captured.graph_module, facts)
        self._is_causal = False  # until the masks were looked at
        self._refused: UnsupportedGraphError | None = None
        self._weights = tuple(place[node] for node in facts.weights)
        self._num_layers, self._tail_rows = facts.num_layers, facts.tail_rows
        self._num_outputs = captured.num_outputs
        self._device = facts.stream.boundaries[0].meta["val"].device
        self._cold = ProgramRunner("cold", cold_program(captured), self._device, engine)
        self._warm = ProgramRunner("warm", warm_program(captured), self._device, engine)
        frontiers = {donors.RESIDUAL: (facts.stream.boundaries[-1], facts.tail_rows.axis)}
        for index, layer in enumerate(facts.layers):
            for letter, node in (("k", layer.key_frontier), ("v", layer.value_frontier)):
                frontiers[f"{index}.{letter}"] = (node, facts.steps[node].axis)
        self._forms = {
            slot: donors.RowForm.of(frontiers[slot][0].meta["val"], frontiers[slot][1])
            for slot in self._cold.recorded
        }
        # What a stored row looks like, and what layers do beside weights: graphs of one model agree on it.
        rows = {slot: frontiers[slot][0] for slot in self._cold.recorded if slot != donors.RESIDUAL}
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
            spans, root = self._spans(args, runs, num_tokens)
        if not runs and self._identifier.embeddings is not None:
            return self._bypass(args, "no span is marked", num_tokens)
        if num_tokens < 2:
            return self._bypass(args, "a sequence of one token", num_tokens)
        self._check_masks(args, spans)
        if self._refused is not None:
            return self._bypass(args, str(self._refused), num_tokens)
        hit = noted if encoder_hit is None else encoder_hit
        with clock.measure("lookup"):
            spans, found = self._look_up(spans)
            request = Request(args, num_tokens, runs, tuple(spans), root, hit, clock)
            prefix, entries = self._known_prefix(request, found)
        request = replace(request, prefix=prefix)
        entries += [found[span.start] for span in spans if span.hit and span.start >= prefix]
        if not entries or (not request.is_exact and self._is_worth_recording(spans)):
            return self._run_cold(replace(request, prefix=0))
        return self._run_warm(request, entries)

    def _spans(self, args: Sequence[Any], runs: list[Run], num_tokens: int) -> tuple[list[Span], str]:
        runs = [run for run in runs if run.length >= self.engine.options.min_span_tokens]
        if not runs:
            return [], ""  # text alone: nothing to look the weights over for
        fingerprint = self.engine.weights_fingerprint([args[index] for index in self._weights])
        weights, salt = f"{fingerprint}|{self._form}", self.engine.options.salt
        spans = []
        for run in runs:
            positions = self._identifier.positions(args, run, num_tokens)
            key = donor_key(run, positions, weights, salt)
            spans.append(Span(0, run.start, run.length, key, False))
        return spans, content_digest([weights, salt])

    def _look_up(self, spans: list[Span]) -> tuple[list[Span], dict[int, Entry]]:
        """The spans, and the donors of those that were found, by the start of the span."""
        looked, found = [], {}
        for span in spans:
            entry = self._get(span.key)
            if entry is not None and donors.fits(entry, self._forms, span.length):
                found[span.start] = entry
                looked.append(replace(span, hit=True, tier=self.engine.store.tier))
            else:
                looked.append(span)
        return looked, found

    def _get(self, key: str) -> Entry | None:
        with self.engine.tolerating_store_errors():
            return self.engine.store.get(key)
        return None

    def _known_prefix(self, request: Request, found: Mapping[int, Entry]) -> tuple[int, list[Entry]]:
        policy, _ = self.engine.choice()
        if not request.spans or not self._is_causal or not policy.keeps_prefix:
            return 0, []

        def find(piece: Piece) -> Entry | None:
            return self._get(piece.key) if piece.span is None else found.get(piece.start)

        length, entries = donors.known_prefix(self._pieces(request), find, self._forms)
        reuses = any(start < length for start in found)
        return (length, entries) if reuses or length >= LEAST_PREFIX_SHARE * request.num_tokens else (0, [])

    def _pieces(self, request: Request) -> Iterator[Piece]:
        return self._prefixes.pieces(
            request.args, request.runs, request.spans, request.num_tokens, request.root
        )

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
            self._is_causal = check.hides_what_follows(args, spans)
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
        request = replace(request, spans=spans)
        if spans:
            self._admit(request, self._cold.recorded, results, plan)
            self._report("cold", "no donor for its spans", request, plan, 1.0)
        else:
            self._report("bypass", "no media span", request, plan, 1.0)
        return results[: self._num_outputs]

    def _admit(self, request: Request, slots: Sequence[str], results: Sequence[Any], plan: Plan) -> None:
        """Store the pieces behind the known prefix; every one of their rows was computed, and exactly."""
        recorded = dict(zip(slots, results[self._num_outputs :], strict=True))
        with request.clock.measure("admit"):
            for piece in self._pieces(request):
                with self.engine.tolerating_store_errors():
                    if piece.start >= request.prefix and self._is_wanted(piece):
                        stored = donors.admit(self.engine.store, piece, recorded, self._forms, plan)
                        if not stored and piece.span is not None:
                            self.engine.note_unstorable(piece.key)

    def _is_wanted(self, piece: Piece) -> bool:
        """True for media, whose donor may be of another prefix, and for text that is not stored yet."""
        return piece.span is not None or (self._is_causal and piece.key not in self.engine.store)

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
        if request.is_exact:
            self._admit(request, self._warm.recorded, results, plan)
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
                    prefix=request.prefix,
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
                prefix_tokens=request.prefix,
                token_layer_fraction=fraction,
                encoder_hit=request.encoder_hit,
                timings_ms=dict(request.clock.elapsed_ms),
                explanations=plan.explanations,
            )
        )
