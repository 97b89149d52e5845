"""Builds the runners of captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.compiler.builders.decoder import Decoder, describe_decoder
from vlcache_fx.compiler.builders.logits import find_logits
from vlcache_fx.compiler.builders.programs import WarmVariants, program_runner
from vlcache_fx.compiler.compile_clock import CompileClock
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.passes import Program
from vlcache_fx.passes.configured import Pipelines
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, SplitResults
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.decode_step import DecodeStepRunner
from vlcache_fx.runtime.encode import EncoderRunner
from vlcache_fx.runtime.prefill import DecoderRunner
from vlcache_fx.spec.mutations import DecodeStepSpec
from vlcache_fx.spec.program import EncoderSpec


def decoder_runner(
    captured: Captured,
    engine: Engine,
    unmodified: Callable[..., Sequence[Any]],
    pipelines: Pipelines,
    facts: DecoderFacts,
    clock: Clock | None = None,
) -> DecoderRunner:
    """Return the runner of a decoder graph whose encoder features are inputs.

    Both programs are built now and lowered when first used. The variants of the warm program, for packed
    donors and to fit donors, are built then, too; TensorRT has none, as its engines were not tried with them.

    Args:
        captured: the graph after clean-up.
        engine: the state shared by the model's graphs.
        unmodified: computes the graph's results without reuse.
        pipelines: the passes for the graph.
        facts: analysis of the graph.
        clock: times of the steps before.

    Raises:
        UnsupportedGraphError: the graph cannot be rewritten.
    """
    clock = clock or Clock()
    clocks = CompileClock(clock, facts.num_layers), CompileClock(clock, facts.num_layers)
    decoder, cold, warm = decoder_programs(captured, pipelines, facts, *clocks)
    variants = WarmVariants(warm, decoder.device, engine) if engine.lowering.name != "tensorrt" else None
    return DecoderRunner(
        decoder.spec,
        decoder.prologue(),
        program_runner("cold", cold, decoder.device, engine, clocks[0]),
        program_runner("warm", warm, decoder.device, engine, clocks[1]),
        decoder.device,
        engine,
        unmodified,
        _logits_to_shadow(decoder, engine),
        variants,
    )


def decoder_programs(
    captured: Captured,
    pipelines: Pipelines,
    facts: DecoderFacts,
    cold_clock: Clock | None = None,
    warm_clock: Clock | None = None,
) -> tuple[Decoder, Program, Program]:
    """Return the description of a decoder graph, its cold and its warm program; see ``decoder_runner``.

    The clocks measure the passes of each program, and the description with the cold one.
    """
    cold_clock, warm_clock = cold_clock or Clock(), warm_clock or Clock()
    with cold_clock.measure("passes"):
        cold = cold_program(captured, pipelines.cold, facts)
    with warm_clock.measure("passes"):
        warm = warm_program(captured, pipelines.warm, facts)
    with cold_clock.measure("analysis"):
        decoder = describe_decoder(captured, facts, cold.recorded)
    return decoder, cold, warm


def encoder_runner(
    split: SplitEncoder | SplitResults, engine: Engine, clock: Clock | None = None
) -> EncoderRunner:
    """Return the runner of an encoder, lowered now. ``clock`` has the times of the steps before.

    Raises:
        LoweringError: the lowering failed.
    """
    lowered = engine.lower(split.encoder, name="encoder", clock=CompileClock(clock))
    spec = EncoderSpec(tuple(split.inputs), tuple(split.weights), tuple(split.computations))
    return EncoderRunner(lambda *args: lowered(args), spec, engine)


def decode_step_runner(
    captured: Captured,
    program: Program,
    engine: Engine,
    unmodified: Callable[..., Sequence[Any]],
    clock: CompileClock | None = None,
) -> DecodeStepRunner:
    """Return the runner of a decoding step, lowered now.

    Args:
        captured: the graph.
        program: the rewritten graph.
        engine: has the lowering.
        unmodified: serves calls whose inputs overlap or are not contiguous.
        clock: times of the steps before.

    Raises:
        LoweringError: the lowering failed, or passes that it requires have not run.
    """
    program.check_complete()
    lowered = engine.lower(program.graph_module, name="decoding step", clock=clock)
    return DecodeStepRunner(decode_step_spec(captured, program), lowered, unmodified)


def decode_step_spec(captured: Captured, program: Program) -> DecodeStepSpec:
    """Return the spec of a decoding step and its program."""
    return DecodeStepSpec(
        captured.writes,
        captured.indices_of(InputKind.DATA),
        tuple(program.in_place),
        captured.num_results,
    )


def _logits_to_shadow(decoder: Decoder, engine: Engine) -> int | None:
    """Return the index of the result that shadow runs compare; None without shadow runs or logits."""
    if not engine.options.shadow:
        return None
    try:
        return find_logits(decoder.captured, decoder.facts)
    except UnsupportedGraphError as refusal:
        engine.refuse_shadow(refusal)
        return None
