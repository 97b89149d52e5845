"""Builds the runners of captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.compiler.builders.decoder import Decoder, describe_decoder
from vlcache_fx.compiler.builders.logits import find_logits
from vlcache_fx.compiler.builders.programs import WarmVariants, program_runner
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.passes import Program
from vlcache_fx.passes.configured import Pipelines
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, SplitResults
from vlcache_fx.passes.standard import cold_program, warm_program
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

    Raises:
        UnsupportedGraphError: the graph cannot be rewritten.
    """
    decoder, cold, warm = decoder_programs(captured, pipelines, facts)
    variants = WarmVariants(warm, decoder.device, engine) if engine.lowering.name != "tensorrt" else None
    return DecoderRunner(
        decoder.spec,
        decoder.prologue(),
        program_runner("cold", cold, decoder.device, engine),
        program_runner("warm", warm, decoder.device, engine),
        decoder.device,
        engine,
        unmodified,
        _logits_to_shadow(decoder, engine),
        variants,
    )


def decoder_programs(
    captured: Captured, pipelines: Pipelines, facts: DecoderFacts
) -> tuple[Decoder, Program, Program]:
    """Return the description of a decoder graph, its cold and its warm program; see ``decoder_runner``."""
    cold = cold_program(captured, pipelines.cold, facts)
    warm = warm_program(captured, pipelines.warm, facts)
    return describe_decoder(captured, facts, cold.recorded), cold, warm


def encoder_runner(split: SplitEncoder | SplitResults, engine: Engine) -> EncoderRunner:
    """Return the runner of an encoder, lowered now.

    Raises:
        LoweringError: the lowering failed.
    """
    lowered = engine.lower(split.encoder, name="encoder")
    spec = EncoderSpec(tuple(split.inputs), tuple(split.weights), tuple(split.computations))
    return EncoderRunner(lambda *args: lowered(args), spec, engine)


def decode_step_runner(
    captured: Captured, program: Program, engine: Engine, unmodified: Callable[..., Sequence[Any]]
) -> DecodeStepRunner:
    """Return the runner of a decoding step, lowered now.

    Args:
        captured: the graph.
        program: the rewritten graph.
        engine: has the lowering.
        unmodified: serves calls whose inputs overlap or are not contiguous.

    Raises:
        LoweringError: the lowering failed, or passes that it requires have not run.
    """
    program.check_complete()
    lowered = engine.lower(program.graph_module, name="decoding step")
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
