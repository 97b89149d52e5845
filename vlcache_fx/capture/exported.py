"""Programs of ``torch.export`` as the IR.

Parameters, buffers and constants are inputs of an exported graph, so its caller binds them
(``bound_tensors``). Unlike in Dynamo's graphs, the kinds of inputs and the input mutations are in the
program's signature.
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
"""Inputs that the program owns."""


def capture_exported(program: ExportedProgram) -> Captured:
    """Return an exported program as the IR; ``program`` is not changed.

    Args:
        program: result of ``torch.export.export``, decomposed (``run_decompositions``) or not, with dynamic
            dimensions where lengths vary.

    Returns:
        The graph, with one placeholder for each of the program's that is a tensor or a size.

    Raises:
        UnsupportedGraphError: CAPTURE_FAILED for inputs that are neither tensors nor numbers, and if torch
            cannot trace the program again; MUTATED_INPUTS, see ``split_writes``.
    """
    module = copy_module(program.graph_module)
    kinds = _kinds(program, module)
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    try:
        traced, writes = _traced(program, module, fakes)
    except UnsupportedGraphError:
        raise
    except Exception as error:  # torch raises many types here; callers need not tell them apart
        raise UnsupportedGraphError(Reason.CAPTURE_FAILED, f"{type(error).__name__}: {error}") from error
    traced.graph.lint()
    return Captured(traced, data_where_written(kinds, writes), (), writes)


def bound_tensors(program: ExportedProgram) -> list[torch.Tensor | None]:
    """Return the tensor of each input of ``capture_exported(program)``, in order; None for arguments."""
    tensors: list[torch.Tensor | None] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in BOUND:
            assert spec.target is not None
            owner = program.state_dict if spec.target in program.state_dict else program.constants
            tensors.append(owner[spec.target])
        elif _is_argument(spec):
            tensors.append(None)
    return tensors


def given_arguments(program: ExportedProgram) -> list[bool]:
    """Return which leaves of the caller's arguments are inputs of ``capture_exported(program)``.

    The others are constants (None, flags) that the export folded in.
    """
    specs = program.graph_signature.input_specs
    return [_is_argument(spec) for spec in specs if spec.kind is Spec.USER_INPUT]


def _is_argument(spec: InputSpec) -> bool:
    """Return True for tensors and sizes that the caller passes, not for folded constants."""
    return spec.kind is Spec.USER_INPUT and not isinstance(spec.arg, ConstantArgument)


def _kinds(program: ExportedProgram, module: fx.GraphModule) -> tuple[InputKind, ...]:
    """Return the kind of each placeholder; erase those of constants from ``module``."""
    kinds = []
    placeholders = module.graph.find_nodes(op="placeholder")
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind in BOUND:
            kinds.append(InputKind.WEIGHT)
        elif _is_argument(spec) and isinstance(spec.arg, TensorArgument):
            kinds.append(InputKind.DATA)
        elif _is_argument(spec) and isinstance(spec.arg, SymIntArgument):
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
    if traced is None:  # the program still has its mutations
        return functionalised(module, fakes)
    # Or it is functional already: new values of mutated inputs come first among its results.
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
