"""From a program that ``torch.export`` made to the IR.

Parameters, buffers and constants are inputs there already, so who runs the captured graph binds them
(``bound_tensors``). What differs from Dynamo's graphs is where the kinds of inputs and the writes are written
down: in the program's signature.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputSpec,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)
from torch.export.graph_signature import InputKind as Spec

from vlcache_fx.capture.direct import trace_without_writes
from vlcache_fx.capture.dynamo import data_where_written, functionalised
from vlcache_fx.capture.mutations import split_writes
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind, Write
from vlcache_fx.ir.copies import copy_module
from vlcache_fx.ir.scatters import canonicalize_slice_scatters

BOUND = frozenset({Spec.PARAMETER, Spec.BUFFER, Spec.CONSTANT_TENSOR})
"""Inputs that belong to the program, not to its caller."""


def capture_exported(program: ExportedProgram) -> Captured:
    """Bring an exported program to the IR. ``program`` is left as it is.

    Args:
        program: as ``torch.export.export`` gives it, or decomposed (``run_decompositions``), with dynamic
            dimensions where lengths vary.

    Returns:
        The graph; one placeholder for each of the program's, but for those that hold no tensor and no size.

    Raises:
        UnsupportedGraphError: CAPTURE_FAILED for inputs that are no tensors or numbers, and where torch
            cannot trace the program again; MUTATED_INPUTS, see ``capture_dynamo``.
    """
    module = copy_module(program.graph_module)
    kinds = _kinds(program, module)
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    try:
        traced, writes = _traced(program, module, fakes)
    except UnsupportedGraphError:
        raise
    except Exception as error:  # torch raises many kinds here; all mean the same to the caller
        raise UnsupportedGraphError(Reason.CAPTURE_FAILED, f"{type(error).__name__}: {error}") from error
    traced.graph.lint()
    return Captured(traced, data_where_written(kinds, writes), (), writes)


def bound_tensors(program: ExportedProgram) -> list[torch.Tensor | None]:
    """The parameter, buffer or constant for each placeholder of ``capture_exported(program)``, in order; None
    for what a caller gives."""
    tensors: list[torch.Tensor | None] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in BOUND:
            assert spec.target is not None
            held = program.state_dict if spec.target in program.state_dict else program.constants
            tensors.append(held[spec.target])
        elif _is_given(spec):
            tensors.append(None)
    return tensors


def given_arguments(program: ExportedProgram) -> list[bool]:
    """For each leaf of the caller's arguments, whether it is an input of ``capture_exported(program)``.

    Others are constants (None, flags) that the export folded in.
    """
    specs = program.graph_signature.input_specs
    return [_is_given(spec) for spec in specs if spec.kind is Spec.USER_INPUT]


def _is_given(spec: InputSpec) -> bool:
    """True for what a caller gives and the graph reads: tensors and sizes, no folded constants."""
    return spec.kind is Spec.USER_INPUT and not isinstance(spec.arg, ConstantArgument)


def _kinds(program: ExportedProgram, module: fx.GraphModule) -> tuple[InputKind, ...]:
    """What each placeholder is; those of constants are erased from ``module``."""
    kinds = []
    placeholders = module.graph.find_nodes(op="placeholder")
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind in BOUND:
            kinds.append(InputKind.WEIGHT)
        elif _is_given(spec) and isinstance(spec.arg, TensorArgument):
            kinds.append(InputKind.DATA)
        elif _is_given(spec) and isinstance(spec.arg, SymIntArgument):
            kinds.append(InputKind.SIZE)
        elif isinstance(spec.arg, ConstantArgument) and not node.users:
            module.graph.erase_node(node)
        else:
            raise UnsupportedGraphError(
                Reason.CAPTURE_FAILED,
                f"an input of kind {spec.kind.name}, {type(spec.arg).__name__}",
                node.name,
            )
    module.recompile()
    return tuple(kinds)


def _traced(
    program: ExportedProgram, module: fx.GraphModule, fakes: Sequence[Any]
) -> tuple[fx.GraphModule, tuple[Write, ...]]:
    inputs = [node.name for node in module.graph.find_nodes(op="placeholder")]
    traced = trace_without_writes(module, fakes)
    if traced is None:  # writes are there as the model makes them
        return functionalised(module, fakes)
    # Or they were taken out before, and what is written comes first among the results.
    names = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs}
    written = [
        names.get(spec.target, spec.target)
        for spec in program.graph_signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    placeholders = traced.graph.find_nodes(op="placeholder")
    canonicalize_slice_scatters(traced.graph)
    writes = split_writes(traced.graph, [placeholders[inputs.index(name)] for name in written])
    traced.recompile()
    return traced, writes
