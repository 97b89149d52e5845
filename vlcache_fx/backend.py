"""The ``torch.compile`` backend: ``torch.compile(model, backend="vlcache", options={...})``.

For every graph that Dynamo hands over::

    capture -> clean up -> [split off the encoder] -> analyse, rewrite -> lower -> run

A graph that cannot be rewritten runs unmodified, for a typed reason.
"""

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from vlcache_fx.analysis import analyze
from vlcache_fx.capture import capture_dynamo
from vlcache_fx.capture.decode_steps import attends
from vlcache_fx.capture.dynamo_settings import RECOMPILE_LIMIT
from vlcache_fx.capture.wrapped import Unwrapped
from vlcache_fx.compiler.builders.runners import decoder_runner, encoder_runner, step_runner
from vlcache_fx.compiler.builders.spans import merge_marks
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.regions import raise_recompile_limit, watch
from vlcache_fx.compiler.unmodified import Compiled, DynamoGraph, Rewrapped, Unmodified
from vlcache_fx.compiling import compiling, raise_limit_of_function
from vlcache_fx.errors import LoweringError, PassError, Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.options import Options
from vlcache_fx.passes import Program
from vlcache_fx.passes.classify import GraphKind, classify
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, split_results
from vlcache_fx.passes.standard import CLEANUP, step_program
from vlcache_fx.runtime.cross_attention import CrossAttendingRunner
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients
from vlcache_fx.runtime.report import Report, one_line

_log = logging.getLogger(__name__)

NOTHING_TO_REUSE = frozenset({Reason.NO_ATTENTION, Reason.PAST_KEYS})
"""Pieces of a model and decoding steps: neither logged, raised nor reported.

A decoding step may be refused for another reason before that one is found; it is as silent then."""

NOT_AN_ERROR = frozenset({Reason.NO_MERGE})
"""A prompt of text alone: reported, but no reason to warn or raise."""


def vlcache(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend as ``torch.compile`` calls it, found through the entry point ``vlcache``.

    Graphs compiled with equal options share one engine, and so their donors: keys are complete, so models do
    not mix. ``engine_for(options)`` gives it. ``torch.compile(mode=...)`` is the option ``mode``.

    Dynamo's ``recompile_limit`` is raised in this process if it has torch's default.

    Raises:
        OptionError: an option is unknown or has a bad value.
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
    engine = engine_for(options if mode is None else {**(options or {}), "mode": mode})
    raise_recompile_limit()
    if torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT:  # else the user set another one
        raise_limit_of_function(RECOMPILE_LIMIT)
    watch(engine)
    return compile_graph(graph_module, example_inputs, engine)


def engine_for(options: Mapping[str, Any] | None = None) -> Engine:
    """The engine that ``torch.compile(backend="vlcache")`` uses for these options in this process."""
    parsed = Options.parse(options)
    with _engine_lock:  # threads that ask at once get one engine, not one each
        return _engine(parsed)


_engine_lock = threading.Lock()


@functools.lru_cache(maxsize=32)
def _engine(options: Options) -> Engine:
    # A backend is a bare function to Dynamo; per process and options is the only place where state can live.
    return Engine(options)


def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> Compiled:
    """Compile one graph for ``engine``. The result takes the graph's inputs and returns its outputs."""
    compiled = _compile(graph_module, example_inputs, engine)
    with_gradients = records_gradients(example_inputs)

    def run(*args: Any) -> Sequence[Any]:
        engine.note_graph_call()
        if not with_gradients and records_gradients(args):
            # Dynamo may skip the guards of parameters: requires_grad_() on a compiled model can come here.
            engine.bypass(gradient_refusal())
            results: Sequence[Any] = graph_module(*args)
            return results
        return compiled(*args)

    return run


def _compile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> Compiled:
    unmodified: Unmodified = DynamoGraph(graph_module, example_inputs, engine)
    try:
        unwrapped = Unwrapped.of(graph_module, example_inputs)
    except UnsupportedGraphError as refusal:
        return _refused(refusal, unmodified, engine)
    if unwrapped is not None:
        graph_module, example_inputs = unwrapped.graph_module, unwrapped.example_inputs
        unmodified = Rewrapped(unmodified, unwrapped)

    def capture() -> Captured:
        if records_gradients(example_inputs):
            if attends(graph_module.graph):
                raise gradient_refusal()
            raise UnsupportedGraphError(Reason.NO_ATTENTION, "nothing to reuse, with gradients or without")
        try:
            return capture_dynamo(graph_module, example_inputs)
        except UnsupportedGraphError as refusal:
            if unwrapped is None or refusal.reason is not Reason.CAPTURE_FAILED:
                raise
            detail = f"weights of the class {unwrapped.classes} cannot be traced: {refusal.detail}"
            raise UnsupportedGraphError(refusal.reason, detail) from refusal

    compiled = compile_captured(capture, unmodified, engine)
    return compiled if unwrapped is None else lambda *args: compiled(*unwrapped.flat(args))


def compile_captured(capture: Callable[[], Captured], unmodified: Unmodified, engine: Engine) -> Compiled:
    """What ``capture`` brings to the IR, with reuse; or ``unmodified``, where that cannot be, for a reason.

    Raises:
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
    with compiling():
        return _compile_captured(capture, unmodified, engine)


def _compile_captured(capture: Callable[[], Captured], unmodified: Unmodified, engine: Engine) -> Compiled:
    captured = None
    try:
        captured = capture()
        CLEANUP.run(Program(captured.graph_module))
        compiled = _rewrite(captured, engine, unmodified)
    except UnsupportedGraphError as refusal:
        if refusal.reason in NOTHING_TO_REUSE or unmodified.is_decoding_step():
            return _without_reuse(captured, unmodified, engine)
        return _refused(refusal, unmodified, engine, continues=_goes_on(refusal, captured))
    except (PassError, LoweringError) as failure:  # ours to fix, but no reason to fail the user's call
        return _refused(UnsupportedGraphError(Reason.LOWERING_FAILED, str(failure)), unmodified, engine)
    unmodified.release()
    return _guarded(compiled, captured, unmodified)


def _rewrite(captured: Captured, engine: Engine, unmodified: Unmodified) -> Compiled:
    found = classify(captured)
    match found.kind:
        case GraphKind.ENCODER:
            return _keep_results(captured, engine)
        case GraphKind.MERGE:
            return _mark_spans(captured, unmodified)
        case GraphKind.CROSS_ATTENDING:
            assert found.split is not None
            return _keep_attended(found.split, engine)
        case GraphKind.DECODER:
            assert found.facts is not None
            if not found.facts.merges:
                unmodified.prepare()  # serves every call in which no span is marked
            return _reuse_spans(captured, found.split, engine, unmodified)


def _mark_spans(captured: Captured, unmodified: Unmodified) -> Compiled:
    """A graph that merges and attends to nothing."""
    marks, merge = merge_marks(captured), unmodified.prepare()
    assert marks is not None
    return lambda *args: marks.mark(args, merge(*args))


def _reuse_spans(
    captured: Captured, split: SplitEncoder | None, engine: Engine, unmodified: Unmodified
) -> Compiled:
    """A decoder, and the encoder of its spans where that is in the same graph."""
    if split is None:
        decoder = decoder_runner(captured, engine, unmodified)
        return lambda *args: decoder(args)
    original = len(captured.kinds)
    decoder = decoder_runner(split.decoder, engine, lambda *args: unmodified(*args[:original]))
    if not split.computes:
        return lambda *args: decoder([*args, *split.encoder(*args)])
    encoder = encoder_runner(split, engine)

    def run(*args: Any) -> Sequence[Any]:
        features, hit = encoder(args)
        return decoder([*args, *features], encoder_hit=hit)

    return run


def _keep_results(captured: Captured, engine: Engine) -> Compiled:
    """A graph that is an encoder; text in the same graph stays out of its keys."""
    split = split_results(captured)
    encoder = encoder_runner(split, engine)
    if not split.other_places:
        return lambda *args: split.joined(encoder(args)[0], ())
    others = engine.lower(split.others, name="encoder")
    return lambda *args: split.joined(encoder(args)[0], others(args))


def _keep_attended(split: SplitEncoder, engine: Engine) -> Compiled:
    """A decoder that looks at an item through cross-attention: what is made of the item alone is kept."""
    encoder = encoder_runner(split, engine)
    decoder = engine.lower(split.decoder.graph_module, name="cross-attending decoder")
    return CrossAttendingRunner(encoder, decoder, engine)


def _without_reuse(captured: Captured | None, unmodified: Unmodified, engine: Engine) -> Compiled:
    """A piece of a model; or a decoding step, of which equal layers are compiled once, if found."""
    if captured is None or engine.lowering.name != "inductor" or not unmodified.is_decoding_step():
        return unmodified.prepare()
    try:
        program = step_program(captured)
        step = step_runner(captured, program, engine, unmodified)
    except (UnsupportedGraphError, PassError, LoweringError) as failure:
        _log.debug("a decoding step is compiled as a whole: %s", failure)
        return unmodified.prepare()
    unmodified.release()
    return _guarded(step, captured, unmodified)


def _guarded(compiled: Compiled, captured: Captured, unmodified: Compiled) -> Compiled:
    if not captured.specialised:
        return compiled
    return lambda *args: compiled(*args) if captured.holds_for(args) else unmodified(*args)


def _goes_on(refusal: UnsupportedGraphError, captured: Captured | None) -> bool:
    """True for text alone behind what a growing cache holds: a draft that is checked, a chunk of a prompt."""
    if captured is None or captured.writes or refusal.reason is not Reason.NO_MERGE:
        return False
    return bool(analyze(captured).past)


def _refused(
    refusal: UnsupportedGraphError, unmodified: Unmodified, engine: Engine, *, continues: bool = False
) -> Compiled:
    if refusal.reason is Reason.GRAD_REQUIRED:
        engine.refuse_call(refusal)
    elif refusal.reason not in NOT_AN_ERROR:
        engine.refuse(refusal)
    compiled = unmodified.prepare()

    def run(*args: Any) -> Sequence[Any]:
        report = Report("bypass", one_line(str(refusal)), reason_code=refusal.reason)
        engine.report(report, continues=continues)
        return compiled(*args)

    return run
