"""The ``torch.compile`` backend: ``torch.compile(model, backend="vlcache", options={...})``.

For every graph that Dynamo hands over::

    capture -> clean up -> [split off the encoder] -> analyse, rewrite -> lower -> run

A graph that cannot be rewritten runs unmodified, for a typed reason.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.cross import find_cross_attended
from vlcache_fx.analysis.encoder import is_encoder
from vlcache_fx.capture import Captured, capture_dynamo
from vlcache_fx.errors import LoweringError, PassError, Reason, UnsupportedGraphError
from vlcache_fx.options import Options
from vlcache_fx.passes import Program
from vlcache_fx.passes.split_encoder import SplitEncoder, SplitResults, split_encoder, split_results
from vlcache_fx.passes.standard import CLEANUP, step_program
from vlcache_fx.runtime.cross import CrossAttendingRunner
from vlcache_fx.runtime.decoder import DecoderRunner
from vlcache_fx.runtime.encoder import EncoderRunner
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.merges import MergeMarks
from vlcache_fx.runtime.report import Report, one_line
from vlcache_fx.runtime.step import StepRunner
from vlcache_fx.runtime.unmodified import Compiled, DynamoGraph, Unmodified

_log = logging.getLogger(__name__)

NOTHING_TO_REUSE = frozenset({Reason.NO_ATTENTION, Reason.PAST_KEYS})
"""Pieces of a model and decoding steps: neither logged, raised nor reported.

A decoding step may be refused for another reason before that one is found; it is as silent then."""

NOT_AN_ERROR = frozenset({Reason.NO_MERGE})
"""A prompt of text alone: reported, but no reason to warn or raise."""


def vlcache(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Compiled:
    """The backend as ``torch.compile`` calls it, found through the entry point ``vlcache``.

    Graphs compiled with equal options share one engine, and so their donors: keys are complete, so models do
    not mix. ``engine_for(options)`` gives it.

    Raises:
        OptionError: an option is unknown or has a bad value.
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
    return compile_graph(graph_module, example_inputs, engine_for(options))


def engine_for(options: Mapping[str, Any] | None = None) -> Engine:
    """The engine that ``torch.compile(backend="vlcache")`` uses for these options in this process."""
    return _engine(Options.parse(options))


@functools.lru_cache(maxsize=32)
def _engine(options: Options) -> Engine:
    # A backend is a bare function to Dynamo; per process and options is the only place where state can live.
    return Engine(options)


def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> Compiled:
    """Compile one graph for ``engine``. The result takes the graph's inputs and returns its outputs."""
    compiled = _compile(graph_module, example_inputs, engine)

    def run(*args: Any) -> Sequence[Any]:
        engine.graph_calls += 1
        return compiled(*args)

    return run


def _compile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> Compiled:
    def capture() -> Captured:
        check_gradients(example_inputs)
        return capture_dynamo(graph_module, example_inputs)

    return compile_captured(capture, DynamoGraph(graph_module, example_inputs, engine), engine)


def compile_captured(capture: Callable[[], Captured], unmodified: Unmodified, engine: Engine) -> Compiled:
    """What ``capture`` brings to the IR, with reuse; or ``unmodified``, where that cannot be, for a reason.

    Raises:
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
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
    if is_encoder(captured):
        if captured.writes:
            raise UnsupportedGraphError(Reason.MUTATED_INPUTS, "an encoder that writes to its inputs")
        return _keep_results(captured, engine)
    marks = MergeMarks.of(captured)
    if marks is not None:
        merge = unmodified.prepare()
        return lambda *args: marks.mark(args, merge(*args))
    attended = split_encoder(captured, find_cross_attended(captured))
    if attended is not None and attended.computes:
        return _keep_attended(attended, engine)
    facts = analyze(captured)
    if not facts.merges:
        if facts.stream.boundaries[0].op != "placeholder":
            raise UnsupportedGraphError(Reason.NO_MERGE, "no encoder features enter the token embeddings")
        unmodified.prepare()  # serves every call in which no span is marked
    split = split_encoder(captured, facts.encoder)
    if split is None:
        decoder = DecoderRunner.of(captured, engine, unmodified)
        return lambda *args: decoder(args)
    original = len(captured.kinds)
    decoder = DecoderRunner.of(split.decoder, engine, lambda *args: unmodified(*args[:original]))
    if not split.computes:
        return lambda *args: decoder([*args, *split.encoder(*args)])
    encoder = _kept(split, engine)

    def run(*args: Any) -> Sequence[Any]:
        features, hit = encoder(args)
        return decoder([*args, *features], encoder_hit=hit)

    return run


def _keep_results(captured: Captured, engine: Engine) -> Compiled:
    """A graph that is an encoder; text in the same graph stays out of its keys."""
    split = split_results(captured)
    encoder = _kept(split, engine)
    if not split.other_places:
        return lambda *args: split.joined(encoder(args)[0], ())
    others = _lowered(split.others, engine)
    return lambda *args: split.joined(encoder(args)[0], others(*args))


def _keep_attended(split: SplitEncoder, engine: Engine) -> Compiled:
    """A decoder that looks at an item through cross-attention: what is made of the item alone is kept."""
    encoder = _kept(split, engine)
    decoder = engine.lowering.lower(split.decoder.graph_module, name="cross-attending decoder")
    return CrossAttendingRunner(encoder, decoder, engine)


def _kept(split: SplitEncoder | SplitResults, engine: Engine) -> EncoderRunner:
    run = _lowered(split.encoder, engine)
    return EncoderRunner(run, split.inputs, split.weights, split.computations, engine)


def _lowered(encoder: fx.GraphModule, engine: Engine) -> Compiled:
    run = engine.lowering.lower(encoder, name="encoder")
    return lambda *args: run(args)


def check_gradients(example_inputs: Sequence[Any]) -> None:
    """Raises UnsupportedGraphError where torch records gradients for any of the inputs."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise UnsupportedGraphError(
            Reason.GRAD_REQUIRED, "gradients are recorded; run it under torch.no_grad()"
        )


def _without_reuse(captured: Captured | None, unmodified: Unmodified, engine: Engine) -> Compiled:
    """A piece of a model; or a decoding step, of which equal layers are compiled once, if found."""
    if captured is None or engine.lowering.name != "inductor" or not unmodified.is_decoding_step():
        return unmodified.prepare()
    try:
        program = step_program(captured)
        lowered = engine.lowering.lower(program.graph_module, name="decoding step")
    except (UnsupportedGraphError, PassError, LoweringError) as failure:
        _log.debug("a decoding step is compiled as a whole: %s", failure)
        return unmodified.prepare()
    unmodified.release()
    return _guarded(StepRunner(captured, program, lowered, unmodified), captured, unmodified)


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
    if refusal.reason not in NOT_AN_ERROR:
        engine.refuse(refusal)
    compiled = unmodified.prepare()

    def run(*args: Any) -> Sequence[Any]:
        report = Report("bypass", one_line(str(refusal)), reason_code=refusal.reason)
        engine.report(report, continues=continues)
        return compiled(*args)

    return run
