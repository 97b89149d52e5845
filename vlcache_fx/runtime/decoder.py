"""Runs one decoder graph: spans -> lookup -> policy -> plan -> run -> admit."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.token_axis import shape_of
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.errors import LoweringError, PlanError, Reason, StoreError, UnsupportedGraphError
from vlcache_fx.lowering import Lowered
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime import donors
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.identify import Identifier, Run, donor_key
from vlcache_fx.runtime.mask_check import MaskCheck
from vlcache_fx.runtime.report import Report, SpanReport
from vlcache_fx.store.entry import Entry


class DecoderRunner:
    """A compiled decoder graph: call it with the graph's inputs, get the graph's outputs.

    Both programs are built at once (a graph that cannot be rewritten is refused here) and lowered when first used.

    Args:
        captured: the decoder; encoder features are inputs.
        engine: what it shares with the model's other graphs.
        unmodified: runs the graph as it was captured; serves every call that reuse cannot.

    Raises:
        UnsupportedGraphError: the graph cannot be rewritten.
    """

    def __init__(self, captured: Captured, engine: Engine, unmodified: Callable[..., Sequence[Any]]) -> None:
        self.engine = engine
        self.unmodified = unmodified
        facts = analyze(captured)
        data = [index for index, kind in enumerate(captured.kinds) if kind is InputKind.DATA]
        place = {node: index for index, node in enumerate(captured.placeholders)}
        self._identifier = Identifier.of(captured.graph_module, facts, data)
        self._mask_check: MaskCheck | None = MaskCheck(captured.graph_module, facts)
        self._refused: UnsupportedGraphError | None = None
        self._weights = tuple(place[node] for node in facts.weights)
        self._scales = tuple(layer.site.scale for layer in facts.layers)
        self._num_layers = facts.num_layers
        self._tail_rows = facts.tail_rows
        start = facts.stream.boundaries[0]
        self._device = start.meta["val"].device
        self._cold, self._warm = cold_program(captured), warm_program(captured)
        frontiers = {"residual": (facts.stream.boundaries[-1], facts.tail_rows.axis)}
        for index, layer in enumerate(facts.layers):
            frontiers[f"{index}.k"] = (layer.key_frontier, facts.steps[layer.key_frontier].axis)
            frontiers[f"{index}.v"] = (layer.value_frontier, facts.steps[layer.value_frontier].axis)
        self._dims = {slot: frontiers[slot][1] for slot in self._cold.recorded}
        # What a stored row looks like; graphs of one model agree on it, others must not share donors.
        self._form = tuple(
            (slot, str(frontiers[slot][0].meta["val"].dtype), str(shape_of(frontiers[slot][0])[-1]))
            for slot in self._cold.recorded
            if slot != "residual"
        )
        self._num_outputs = len(next(iter(reversed(captured.graph_module.graph.nodes))).args[0])  # type: ignore[arg-type]
        self._lowered: dict[str, Lowered | None] = {}

    def __call__(self, args: Sequence[Any], *, encoder_hit: bool | None = None) -> Sequence[Any]:
        """Run one request. Never fails for reasons of reuse: what goes wrong there costs only the reuse."""
        clock = _Clock()
        noted = self.engine.take_encoder_note()
        encoder_hit = noted if encoder_hit is None else encoder_hit
        with clock.measure("identify"):
            identified = self._identifier.runs(args)
            if identified is None:
                return self._bypass(args, "placeholders and encoder features do not agree in number")
            num_tokens, runs = identified
            weights = self.engine.weights_fingerprint([args[index] for index in self._weights])
            spans = self._spans(args, runs, num_tokens, weights)
        if not runs and self._identifier.embeddings is not None:
            return self._bypass(args, "no span is marked", num_tokens)
        if num_tokens < 2:
            return self._bypass(args, "a sequence of one token", num_tokens)
        self._check_masks(args, spans)
        if self._refused is not None:
            return self._bypass(args, str(self._refused), num_tokens)
        with clock.measure("lookup"):
            spans, entries = self._look_up(spans)
        if not entries or self._should_record(spans):
            spans = [_as_miss(span) for span in spans]
            return self._run_cold(args, spans, num_tokens, clock, encoder_hit)
        return self._run_warm(args, spans, entries, num_tokens, clock, encoder_hit)

    # spans, donors ---------------------------------------------------------------------------------------------

    def _spans(self, args: Sequence[Any], runs: list[Run], num_tokens: int, weights: str) -> list[Span]:
        salt = self.engine.options.salt
        own = f"{weights}|{self._form}|{self._scales}"
        return [
            Span(0, run.start, run.length, donor_key(run, self._identifier.positions(args, run, num_tokens), own, salt), False)
            for run in runs
            if run.length >= self.engine.options.min_span_tokens
        ]

    def _look_up(self, spans: list[Span]) -> tuple[list[Span], list[Entry]]:
        looked, entries = [], []
        for span in spans:
            try:
                entry = self.engine.store.get(span.key)
            except StoreError as error:
                self.engine.store_failed(error)
                entry = None
            if entry is not None and donors.fits(entry, self._dims, span.length):
                entries.append(entry)
                looked.append(Span(span.sample, span.start, span.length, span.key, True, self.engine.store.tier))
            else:
                looked.append(span)
        return looked, entries

    def _should_record(self, spans: list[Span]) -> bool:
        """True where an item has missed for the second time: it recurs, so an exact run is worth its donor.

        In a warm run it could not be recorded: it attends to approximate rows before it, and approximate rows
        are never stored.
        """
        repeated = [self.engine.missed_before(span.key) for span in spans if not span.hit]
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

    # running ---------------------------------------------------------------------------------------------------

    def _run_cold(
        self, args: Sequence[Any], spans: list[Span], num_tokens: int, clock: "_Clock", encoder_hit: bool | None
    ) -> Sequence[Any]:
        positions = self._tail_rows.positions(num_tokens)
        with clock.measure("plan"):
            plan = build_plan(
                num_tokens=num_tokens, spans=[], num_layers=self._num_layers, policy=self.engine.policy, budget=0.0,
                output_rows=positions,
            )  # fmt: skip
            bound = self._bind(self._cold, plan, positions, {})
        program = self._program("cold", self._cold)
        if program is None:
            return self._bypass(args, "the rewritten graph did not compile", num_tokens)
        with clock.measure("run"):
            results = program([*args, *bound])
        recorded = dict(zip(self._cold.recorded, results[self._num_outputs :], strict=True))
        with clock.measure("admit"):
            for span in spans:
                try:
                    donors.admit(self.engine.store, span, recorded, self._dims)
                except StoreError as error:
                    self.engine.store_failed(error)
        reason = "no donor for its spans" if spans else "no media span"
        self._report("cold" if spans else "bypass", reason, spans, plan, clock, encoder_hit, 1.0)
        return results[: self._num_outputs]

    def _run_warm(
        self, args: Sequence[Any], spans: list[Span], entries: list[Entry], num_tokens: int, clock: "_Clock",
        encoder_hit: bool | None,
    ) -> Sequence[Any]:  # fmt: skip
        positions = self._tail_rows.positions(num_tokens)
        with clock.measure("plan"):
            try:
                plan = build_plan(
                    num_tokens=num_tokens, spans=spans, num_layers=self._num_layers, policy=self.engine.policy,
                    profile=self.engine.profile, budget=self.engine.options.budget, output_rows=positions,
                    strict=self.engine.options.strict,
                )  # fmt: skip
            except PlanError as error:
                if self.engine.options.strict:
                    raise
                return self._bypass(args, f"no plan: {error}", num_tokens)
        with clock.measure("bind"):
            tables = donors.tables(entries, self._dims, self._device)
            bound = self._bind(self._warm, plan, positions, tables)
        program = self._program("warm", self._warm)
        if program is None:
            return self._bypass(args, "the rewritten graph did not compile", num_tokens)
        with clock.measure("run"):
            results = program([*args, *bound])
        self._report("warm", None, spans, plan, clock, encoder_hit, plan.token_layer_fraction)
        return results[: self._num_outputs]

    def _bypass(self, args: Sequence[Any], reason: str, num_tokens: int = 0) -> Sequence[Any]:
        self.engine.report(Report("bypass", reason, num_tokens))
        return self.unmodified(*args)

    def _program(self, name: str, program: Program) -> Lowered | None:
        """The lowered program, or None where it does not compile (said once, as a refusal)."""
        if name not in self._lowered:
            try:
                self._lowered[name] = self.engine.lowering.lower(program.graph_module, name=name)
            except LoweringError as error:
                self._lowered[name] = None
                self.engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, str(error)))
        return self._lowered[name]

    def _bind(
        self, program: Program, plan: Plan, positions: Tensor | None, tables: dict[str, Tensor]
    ) -> list[Tensor]:
        """The values of the inputs that passes added, in their order."""
        on_device: dict[int, Tensor] = {}

        def moved(tensor: Tensor) -> Tensor:
            if self._device.type == "cpu":
                return tensor
            if id(tensor) not in on_device:
                on_device[id(tensor)] = tensor.to(self._device, non_blocking=True)
            return on_device[id(tensor)]

        bound = []
        for slot in program.slots:
            kind, _, rest = slot.partition(".")
            if kind == "donor":
                bound.append(tables[rest])
            elif kind == "results":
                assert positions is not None
                bound.append(moved(torch.searchsorted(plan.rows[-1], positions)))
            else:
                bound.append(moved({"rows": plan.rows, "keep": plan.keep, "source": plan.source}[kind][int(rest)]))
        return bound

    def _report(
        self, mode: Any, reason: str | None, spans: list[Span], plan: Plan, clock: "_Clock", encoder_hit: bool | None,
        fraction: float,
    ) -> None:  # fmt: skip
        self.engine.report(
            Report(
                mode, reason, plan.num_tokens,
                tuple(SpanReport(s.start, s.length, s.key, s.hit, s.tier) for s in spans),
                plan.rows_per_layer, fraction, encoder_hit, dict(clock.elapsed_ms), plan.explanations,
            )
        )  # fmt: skip


def _as_miss(span: Span) -> Span:
    return Span(span.sample, span.start, span.length, span.key, False)


class _Clock:
    """Milliseconds per step."""

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed_ms[step] = (time.perf_counter() - start) * 1e3
