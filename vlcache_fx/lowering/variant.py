"""Compilation of a structure with Inductor, for all sizes that meet the conditions of its code."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ir.fakes import Shapes
from vlcache_fx.ir.sizes import hint
from vlcache_fx.lowering.base import Decompositions
from vlcache_fx.lowering.expressions import compile_expressions
from vlcache_fx.lowering.fingerprint import Structure
from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.rewrite.use_row_positions import SDPA, UseRowPositions

__all__ = ["CONFIG_PATCHES", "Runner", "Variant", "compile_variant"]

# A boxed call: takes a list of arguments, which it may clear, and returns the outputs.
Runner: TypeAlias = Callable[[list[Any]], Sequence[Any]]

CONFIG_PATCHES: Mapping[str, Any] = {
    # Tune in the first call: at compile time, Triton's kernels would run on the example sizes. These are
    # independent of each other, so indices would be out of bounds and CUDA would fail for the process.
    "triton.autotune_at_compile_time": False,
}


FOR_CPUS = Pipeline((UseRowPositions(),), name="segment")
"""Passes for each segment whose attention is decomposed."""


@dataclass(frozen=True)
class Variant:
    """Compiled code of a structure.

    Attributes:
        holds: function of the sizes of a call, in the order of the structure's symbols; True if they meet the
            conditions.
        run: function of the sizes and the arguments.
        conditions: conditions on sizes that the code assumes, besides "at least 2".
    """

    holds: Callable[[tuple[int, ...]], bool]
    run: Runner
    conditions: tuple[sympy.Basic, ...]


def compile_variant(
    structure: Structure,
    examples: Mapping[sympy.Symbol, int],
    decompositions: Decompositions,
    options: Mapping[str, Any],
) -> Variant:
    """Compile a structure.

    Args:
        structure: structure of a segment.
        examples: a size for each of its symbols. Sizes 0 and 1 are compiled as constants, since they change
            the meaning of code (broadcasts, empty loops); other sizes stay symbolic.
        decompositions: operators to replace by ATen before compilation.
        options: ``options`` of ``torch._inductor.standalone_compile``.
    """
    shapes = Shapes()
    made: dict[sympy.Symbol, sympy.Expr] = {
        symbol: shapes.symbol(str(symbol), example) if example >= 2 else sympy.Integer(example)
        for symbol, example in examples.items()
    }
    with torch.inference_mode(False), torch.no_grad():
        inputs = _inputs(structure, made, examples, shapes)
        with tracing(TracingContext(shapes.mode)):
            artifact = standalone_compile(
                _module(structure, decompositions, shapes, inputs),
                inputs,
                dynamic_shapes="from_tracing_context",
                options=dict(options),
            )
    symbols = {inner: symbol for symbol, inner in made.items() if isinstance(inner, sympy.Symbol)}
    conditions = _conditions(shapes, symbols)
    return Variant(_check(structure, examples, conditions), _boxed(artifact), tuple(conditions))


def _inputs(
    structure: Structure,
    made: Mapping[sympy.Symbol, sympy.Expr],
    examples: Mapping[sympy.Symbol, int],
    shapes: Shapes,
) -> list[Any]:
    """Return the sizes, and a fake value for each argument.

    The sizes are separate inputs, as in Dynamo: torch's caches on disk distinguish entries of a graph only by
    conditions on int inputs, and would return code for other sizes without them.
    """
    values = {inner: examples[symbol] for symbol, inner in made.items() if isinstance(inner, sympy.Symbol)}

    def size(given: int | sympy.Expr) -> Any:
        return shapes.size(given if isinstance(given, int) else given.xreplace(made), values)

    inputs: list[Any] = [size(symbol) for symbol in made]
    for spec in structure.inputs:
        sizes = list(map(size, spec.sizes))
        if spec.dtype is None or spec.device is None:
            inputs.append(sizes[0])
        else:
            inputs.append(shapes.empty(sizes, list(map(size, spec.strides)), spec.dtype, spec.device))
    return inputs


def _module(
    structure: Structure, decompositions: Decompositions, shapes: Shapes, inputs: list[Any]
) -> GraphModule:
    """Return a copy of the graph for the compiler, with the decompositions applied."""
    graph = Graph()
    for symbol in structure.symbols:
        graph.placeholder(str(symbol))
    graph.output(graph.graph_copy(structure.module.graph, {}))
    module = GraphModule(structure.module, graph, class_name="Segment")
    rewritten = SDPA in decompositions and any(record.changed for record in FOR_CPUS.run(Program(module)))
    if rewritten or any(node.target in decompositions for node in graph.nodes):
        module.recompile()
        with shapes.mode:
            module = make_fx(module, decomposition_table=dict(decompositions), pre_dispatch=True)(*inputs)
    return module


def _check(
    structure: Structure, examples: Mapping[sympy.Symbol, int], conditions: Sequence[sympy.Basic]
) -> Callable[[tuple[int, ...]], bool]:
    tests: list[sympy.Basic] = [
        sympy.Ge(symbol, 2, evaluate=False) if example >= 2 else sympy.Eq(symbol, example, evaluate=False)
        for symbol, example in examples.items()
    ]
    tests += conditions
    sources = {symbol: f"sizes[{index}]" for index, symbol in enumerate(structure.symbols)}
    function = compile_expressions(
        [sympy.And(*tests, evaluate=False) if tests else sympy.true], sources, "sizes"
    )
    return lambda sizes: bool(function(sizes)[0])


def _conditions(shapes: Shapes, back: Mapping[sympy.Symbol, sympy.Symbol]) -> list[sympy.Basic]:
    """Return the guards of a compilation that do not follow from all symbols being at least 2."""
    plain = Shapes()
    fresh = {
        inner: plain.symbol(str(symbol), hint(index)) for index, (inner, symbol) in enumerate(back.items())
    }
    found: list[sympy.Basic] = []
    for guard in shapes.env.guards:
        if plain.env._maybe_evaluate_static(guard.expr.xreplace(fresh)) == sympy.true:
            continue
        condition = guard.expr.xreplace(dict(back))
        if condition not in found:
            found.append(condition)
    return found


def _boxed(artifact: Any) -> Runner:
    """Return the boxed callable of an artifact, which takes a list so that it can free inputs early."""
    # AOTAutograd wraps it in functions of *args, which do nothing for a graph without parameters.
    found = getattr(artifact, "_compiled_fn", None)
    while isinstance(found, FunctionType) and found.__code__.co_flags & inspect.CO_VARARGS:
        found = getattr(found, "__wrapped__", None)
    if callable(found) and getattr(found, "_boxed_call", False):
        return cast(Runner, found)
    return lambda args: cast(Sequence[Any], artifact(*args))
