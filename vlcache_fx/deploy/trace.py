"""Traces a model: its decoder as one captured graph with named inputs and results, and its encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.capture.exported import bound_tensors, capture_exported, given_arguments
from vlcache_fx.errors import ExportError, Reason, UnsupportedGraphError
from vlcache_fx.integrations.stages import GenerationStages, Stage, generation_stages
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, split_encoder
from vlcache_fx.passes.standard import CLEANUP


@dataclass(frozen=True)
class ExportInput:
    """A traced model.

    Attributes:
        decoder: the prefill graph; encoder features are inputs.
        facts: its analysis.
        inputs: name of each placeholder; None for weights.
        weights: index of a placeholder -> name and tensor.
        values: named input -> example; without the outputs of a split-off encoder.
        dynamic: named input -> dynamic dimension -> name.
        results: names of the traced code's results.
        split: the encoder that was split off the graph, if any.
        stages: encoder, prefill and decoding step of a model of the transformers library.
    """

    decoder: Captured
    facts: DecoderFacts
    inputs: tuple[str | None, ...]
    weights: dict[int, tuple[str, Tensor]]
    values: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    results: tuple[str, ...]
    split: SplitEncoder | None
    stages: GenerationStages | None


def capture_for_export(
    model: nn.Module, example: Any, dynamic_shapes: Any, cleanup: Pipeline = CLEANUP
) -> ExportInput:
    """Trace a model.

    Args:
        model: a model of the transformers library, or any model that ``torch.export`` can trace.
        example: keyword arguments, or a tuple of positional arguments.
        dynamic_shapes: see ``torch.export.export``; for models of other libraries. By default every
            dimension that the model does not fix.
        cleanup: the passes before analysis.

    Raises:
        ExportError: torch cannot export the model, or the example is unsuitable.
        UnsupportedGraphError: the graph cannot be rewritten.
    """
    stages = generation_stages(model, example) if isinstance(example, Mapping) else None
    if stages is not None:
        program = trace(stages.prefill)
        names: Sequence[str] = tuple(stages.prefill.inputs)
        given = list(stages.prefill.inputs.values())
        results: tuple[str, ...] | None = stages.prefill.outputs
    else:
        args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
        program = _exported(model, args, kwargs, dynamic_shapes)
        paths = pytree.tree_leaves_with_path((args, kwargs))
        is_given = given_arguments(program)
        kept = [leaf for leaf, wanted in zip(paths, is_given, strict=True) if wanted]
        names = [_path_name(path) for path, _ in kept]
        given = [value for _, value in kept]
        results = None
    captured = capture_exported(program)
    if captured.writes:
        raise UnsupportedGraphError(Reason.MUTATED_INPUTS, "exported graphs cannot contain input mutations")
    if InputKind.SIZE in captured.kinds or not all(isinstance(value, Tensor) for value in given):
        raise ExportError("example_inputs must be tensors: exported graphs have no scalar inputs")
    cleanup.run(Program(captured.graph_module))
    return _split(captured, program, list(names), list(given), results, stages)


def _split(
    captured: Captured,
    program: ExportedProgram,
    names: list[str],
    given: list[Tensor],
    results: tuple[str, ...] | None,
    stages: GenerationStages | None,
) -> ExportInput:
    facts = analyze(captured)
    carriers = [tail.convolution.node for tail in facts.tails]
    carriers += [state.recurrence.node for state in facts.states]
    if carriers:
        text = f"exports have no states of recurrent layers yet ({carriers[0].name})"
        raise UnsupportedGraphError(Reason.TOKEN_MIXING, text)
    if facts.batch_dims is not None:
        raise UnsupportedGraphError(Reason.BATCHED, "exported graphs do not support batches")
    if not facts.merges and facts.stream.boundaries[0].op != "placeholder":
        raise UnsupportedGraphError(Reason.NO_MERGE, "no encoder features enter the token embeddings")
    split = split_encoder(captured, facts.encoder)
    decoder = captured if split is None else split.decoder
    unassigned = iter(names)
    inputs: list[str | None] = []
    weights: dict[int, tuple[str, Tensor]] = {}
    signature = program.graph_signature.input_specs
    specs = [spec for spec in signature if not isinstance(spec.arg, ConstantArgument)]
    for index, (tensor, spec) in enumerate(zip(bound_tensors(program), specs, strict=True)):
        inputs.append(next(unassigned) if tensor is None else None)
        if tensor is not None:
            weights[index] = (str(spec.target), tensor)
    inputs += [f"features.{number}" for number in range(len(decoder.kinds) - len(inputs))]
    dynamic = {} if stages is None else {k: dict(v) for k, v in stages.prefill.dynamic.items()}
    for name, node in zip(inputs, decoder.placeholders, strict=True):
        if name is not None and name not in dynamic:
            dynamic[name] = _dynamic_dims(name, node, facts)
    count = decoder.num_results
    return ExportInput(
        decoder=decoder,
        facts=facts if split is None else facts.without_encoder(split.nodes),
        inputs=tuple(inputs),
        weights=weights,
        values=dict(zip(names, given, strict=True)),
        dynamic=dynamic,
        results=results or tuple(f"result.{number}" for number in range(count)),
        split=split,
        stages=stages,
    )


def _dynamic_dims(name: str, node: fx.Node, facts: DecoderFacts) -> dict[int, str]:
    tokens = str(facts.stream.boundaries[0].meta["val"].shape[1])
    shape = node.meta["val"].shape
    return {
        dim: "tokens" if str(size) == tokens else f"{name}_{dim}".replace(".", "_")
        for dim, size in enumerate(shape)
        if is_dynamic(size)
    }


def is_dynamic(size: Any) -> bool:
    """Return True for a dynamic size; torch may have specialised a symbol to a number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _path_name(path: Any) -> str:
    """Name a path in the arguments' tree: ``input_ids`` for ``(1, 'input_ids')``."""
    parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return ".".join(parts[1:]) if parts[0] == "1" else "argument." + ".".join(parts[1:])


def trace(stage: Stage) -> ExportedProgram:
    """Trace a stage with its dynamic dimensions.

    Raises:
        ExportError: torch cannot trace it.
    """
    return _exported(stage.module, tuple(stage.inputs.values()), {}, stage.shapes(lambda _: Dim.DYNAMIC))


def unrolled(stage: Stage) -> fx.GraphModule:
    """Trace a stage of fixed sizes with its example: loops are unrolled and constants folded.

    Encoders that loop over the grids of their items cannot be traced otherwise.

    Raises:
        ExportError: torch cannot trace it.
    """
    try:
        with torch.no_grad():
            traced = make_fx(stage.module, tracing_mode="real", pre_dispatch=True)(*stage.inputs.values())
            # Tracing records only torch operators: results of numpy became constants.
            others = [
                value.flip(0) / 2 if value.is_floating_point() else value for value in stage.inputs.values()
            ]
            got, want = traced(*others), stage.module(*others)
    except Exception as error:  # torch raises many types; the caller needs the reason
        raise _trace_error(stage.module, error) from error
    for actual, expected in zip(got, want, strict=True):
        if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-3):
            name = type(stage.module).__name__
            raise ExportError(
                f"torch cannot trace this {name}: its result depends on operations outside torch"
            )
    return traced


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    if dynamic_shapes is None:
        dynamic_shapes = pytree.tree_map(
            lambda leaf: dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, Tensor) else None,
            (*args, *kwargs.values()) if not kwargs else {**kwargs},
        )
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # torch raises many types; the caller needs the reason
        raise _trace_error(model, error) from error


def _trace_error(model: nn.Module, error: Exception) -> ExportError:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return ExportError(f"torch cannot trace this {type(model).__name__}: {type(error).__name__}: {first}")
