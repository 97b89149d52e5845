"""Runs one decoder graph: spans -> lookup -> policy -> plan -> run -> admit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlcache_fx.analysis import analyze
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.capture.writes import deliver, overlapping
from vlcache_fx.errors import PlanError, UnsupportedGraphError
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime import donors
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.lookup import DonorLookup
from vlcache_fx.runtime.mask_check import MaskCheck
from vlcache_fx.runtime.program import ProgramRunner
from vlcache_fx.runtime.report import Report
from vlcache_fx.runtime.request import Request
from vlcache_fx.store.entry import Entry


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
        self._masks = MaskCheck(captured.graph_module, facts)
        self._masks_checked = self._is_causal = False
        self._refused: UnsupportedGraphError | None = None
        self._num_layers, self._tail_rows = facts.num_layers, facts.tail_rows
        self._num_outputs, self._num_results = captured.num_outputs, captured.num_results
        self._writes = captured.writes
        self._data = [index for index, kind in enumerate(captured.kinds) if kind is InputKind.DATA]
        self._device = facts.stream.boundaries[0].meta["val"].device
        self._cold = ProgramRunner("cold", cold_program(captured), self._device, engine)
        self._warm = ProgramRunner("warm", warm_program(captured), self._device, engine)
        self._donors = DonorLookup(captured, facts, self._cold.recorded, self._masks, engine)

    def __call__(self, args: Sequence[Any], *, encoder_hit: bool | None = None) -> Sequence[Any]:
        """Run one request. Never fails for reasons of reuse: what goes wrong there costs only the reuse."""
        noted = self.engine.take_encoder_note()
        identifier, clock = self._donors.identifier, Clock()
        with clock.measure("identify"):
            identified = identifier.runs(args)
            if identified is None:
                return self._bypass(args, "placeholders and encoder features do not agree in number or width")
            num_tokens, runs = identified
            hit = noted if encoder_hit is None else encoder_hit
            request = self._donors.request(args, num_tokens, runs, hit, clock)
        if not runs and identifier.embeddings is not None:
            return self._bypass(args, "no span is marked", num_tokens)
        if num_tokens < 2:
            return self._bypass(args, "a sequence of one token", num_tokens)
        if self._writes and overlapping(self._writes, args, self._data):
            return self._bypass(args, "an input that is written to shares memory with another", num_tokens)
        self._check_masks(request)
        if self._refused is not None:
            return self._bypass(args, str(self._refused), num_tokens)
        with clock.measure("lookup"):
            request, entries = self._donors.find(replace(request, is_causal=self._is_causal))
        worth_recording = not request.reuse_is_exact and self._donors.is_worth_recording(request)
        if not entries or worth_recording:
            return self._run_cold(request)
        return self._run_warm(request, entries)

    def _check_masks(self, request: Request) -> None:
        """Once per graph, with the first call that has spans."""
        if self._masks_checked or not request.spans:
            return
        self._masks_checked = True
        call = (request.args, request.num_tokens, request.spans)
        try:
            self._masks.require_causal(*call)
            self._is_causal = self._masks.hides_what_follows(*call)
        except UnsupportedGraphError as refusal:
            self._refused = refusal
            self.engine.refuse(refusal)

    def _run_cold(self, request: Request) -> Sequence[Any]:
        spans = tuple(replace(span, hit=False, tier=None) for span in request.spans)
        request = replace(request, spans=spans, prefix=0)
        plan = self._plan(request)
        if plan is None or not self._cold.ready():
            return self._bypass(request.args, "the rewritten graph did not compile", request.num_tokens)
        bound = self._cold.bind(plan, self._tail_rows.positions(request.num_tokens), {})
        with request.clock.measure("run"):
            results = self._cold.run(request.args, bound)
        if results is None:
            return self._bypass(request.args, "the cold program failed", request.num_tokens)
        if spans:
            self._admit(request, self._cold.recorded, results, plan)
            self.engine.report(request.report("cold", "no donor for its spans", plan, 1.0))
        else:
            self.engine.report(request.report("bypass", "no media span", plan, 1.0))
        return deliver(self._writes, request.args, results, self._num_results)

    def _admit(self, request: Request, slots: Sequence[str], results: Sequence[Any], plan: Plan) -> None:
        recorded = dict(zip(slots, results[self._num_outputs :], strict=True))
        with request.clock.measure("admit"):
            self._donors.admit(request, recorded, plan)

    def _run_warm(self, request: Request, entries: list[Entry]) -> Sequence[Any]:
        plan = self._plan(request)
        if plan is None:
            return self._bypass(request.args, "the policy's rows make no plan", request.num_tokens)
        if not self._warm.ready():
            return self._bypass(request.args, "the rewritten graph did not compile", request.num_tokens)
        with request.clock.measure("bind"):
            tables = donors.tables(entries, self._donors.forms, self._device)
            bound = self._warm.bind(plan, self._tail_rows.positions(request.num_tokens), tables)
        with request.clock.measure("run"):
            results = self._warm.run(request.args, bound)
        if results is None:
            return self._bypass(request.args, "the warm program failed", request.num_tokens)
        if request.reuse_is_exact:
            self._admit(request, self._warm.recorded, results, plan)
        self.engine.report(request.report("warm", None, plan, plan.token_layer_fraction))
        return deliver(self._writes, request.args, results, self._num_results)

    def _plan(self, request: Request) -> Plan | None:
        """The plan, or None where none can be made (raised in strict mode)."""
        strict = self.engine.options.strict
        policy, budget = self.engine.choice()
        with request.clock.measure("plan"):
            try:
                return build_plan(
                    num_tokens=request.num_tokens,
                    spans=request.spans,
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
