"""Compiles each structure once with Inductor, for all sizes, and keeps the result.

A structure is compiled with symbolic sizes of at least 2. Conditions on sizes that the compiler assumed all
the same are collected from the shape environment and checked at every call; where one does not hold (or a
size is 0 or 1, which compilers treat apart), a further *variant* is compiled for sizes like those of the
call.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.errors import LoweringError
from vlcache_fx.lowering.base import Decompositions
from vlcache_fx.lowering.fingerprint import Structure
from vlcache_fx.lowering.row_places import SDPA, read_places
from vlcache_fx.lowering.shapes import Shapes, compile_expressions, hint

__all__ = ["CompileCache", "CompileStats", "Compiled"]

_log = logging.getLogger(__name__)

# A boxed call: takes a list of arguments, which it may empty, and returns the outputs.
Runner: TypeAlias = Callable[[list[Any]], Sequence[Any]]
# Whether the sizes of a call fit, and what to call then with the sizes and the arguments.
_Variant: TypeAlias = tuple[Callable[[tuple[int, ...]], bool], Runner]


CONFIG_PATCHES: Mapping[str, Any] = {
    # Else Triton's kernels are run while they are compiled, on the example sizes. These are independent: a
    # mask is shorter there than the keys it hides, an index is out of its bounds, and CUDA is lost to the
    # process. Kernels are tuned in the first call instead.
    "triton.autotune_at_compile_time": False,
}


def compiling() -> AbstractContextManager[Any]:
    """The lock of all compilations in the process: the compiler's own, so that no two locks can cross."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


@dataclass
class CompileStats:
    """What a cache did.

    Attributes:
        compilations: `(segment, seconds)` of every call of the compiler, variants included.
        hits: segments that found their structure compiled.
        variants: compilations that were needed because sizes broke a condition of an earlier one.
        conditions: per segment compiled, the conditions on sizes beyond "at least 2" that its code assumes.
    """

    compilations: list[tuple[str, float]] = field(default_factory=list)
    hits: int = 0
    variants: int = 0
    conditions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time spent in the compiler."""
        return sum(seconds for _, seconds in self.compilations)


class CompileCache:
    """Compiled structures, shared by all programs of one backend; safe to use from several threads.

    Args:
        options: what `torch._inductor.standalone_compile` takes as `options`, for example
            `{"config_patches": {"max_autotune": True}}`.
        max_variants: of one structure; beyond it, sizes that fit none run uncompiled.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, *, max_variants: int = 8) -> None:
        given = dict(options or {})
        self.options = {**given, "config_patches": {**CONFIG_PATCHES, **given.get("config_patches", {})}}
        self.max_variants = max_variants
        self.stats = CompileStats()
        self._compiled: dict[str, Compiled] = {}

    def get(self, structure: Structure, name: str, decompositions: Decompositions | None = None) -> Compiled:
        """Returns the compiled form of a structure, compiling it at most once.

        Args:
            structure: its key must tell the decompositions, if any, and everything else that code depends on.
            name: for logs and statistics.
            decompositions: operators to express in ATen first.
        """
        with compiling():
            found = self._compiled.get(structure.key)
            if found is None:
                found = Compiled(self, structure, name, decompositions or {})
                self._compiled[structure.key] = found
            else:
                self.stats.hits += 1
            return found

    def clear(self) -> None:
        """Forgets everything compiled; programs already lowered keep what they use."""
        with compiling():
            self._compiled.clear()


class Compiled:
    """One structure and its variants. Calling it takes a list of arguments and returns a sequence of
    outputs."""

    def __init__(
        self, cache: CompileCache, structure: Structure, name: str, decompositions: Decompositions
    ) -> None:
        self.cache, self.structure, self.name, self.decompositions = cache, structure, name, decompositions
        self._read = compile_expressions(structure.symbols, structure.sources, "a")
        examples = {symbol: hint(index) for index, symbol in enumerate(structure.symbols)}
        try:
            first = self._compile(examples)
        except Exception:
            if examples == structure.examples:
                raise
            first = self._compile(structure.examples)
        self._variants: tuple[_Variant, ...] = (first,)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        sizes = self._read(args)
        for holds, run in self._variants:
            if holds(sizes):
                args[:0] = sizes
                return run(args)
        run = self._variant(sizes)
        args[:0] = sizes
        return run(args)

    def _variant(self, found: tuple[int, ...]) -> Runner:
        with compiling():
            for holds, run in self._variants:  # another thread may have been here first
                if holds(found):
                    return run
            sizes = dict(zip(self.structure.symbols, found, strict=True))
            if len(self._variants) >= self.cache.max_variants:
                _log.warning("%s: too many variants; runs uncompiled for %s", self.name, sizes)
                module = self.structure.module
                return lambda values: module(*values[len(found) :])
            _log.info("%s: compiling another variant for the sizes %s", self.name, sizes)
            try:
                made = self._compile(sizes)
            except Exception as error:
                raise LoweringError(f"segment {self.name!r}, sizes {sizes}: {error}") from error
            self.cache.stats.variants += 1
            self._variants = (*self._variants, made)
            return made[1]

    def _compile(self, examples: Mapping[sympy.Symbol, int]) -> _Variant:
        with torch.inference_mode(False), torch.no_grad():
            return self._compile_plainly(examples)

    def _compile_plainly(self, examples: Mapping[sympy.Symbol, int]) -> _Variant:
        start = time.perf_counter()
        shapes = Shapes()
        # Sizes of 0 and 1 change what code means (broadcasts, empty loops), so they become constants.
        made: dict[sympy.Symbol, sympy.Expr] = {
            symbol: shapes.symbol(str(symbol), example) if example >= 2 else sympy.Integer(example)
            for symbol, example in examples.items()
        }
        values = {
            inner: examples[symbol] for symbol, inner in made.items() if isinstance(inner, sympy.Symbol)
        }
        # The sizes are inputs of their own, as Dynamo does it: the caches on disk of torch tell entries of
        # one graph apart by conditions on int inputs alone, and give the code for other sizes where there
        # are none.
        inputs: list[Any] = [shapes.size(inner, values) for inner in made.values()]
        for spec in self.structure.inputs:
            sizes = [shapes.size(v if isinstance(v, int) else v.xreplace(made), values) for v in spec.sizes]
            strides = [
                shapes.size(v if isinstance(v, int) else v.xreplace(made), values) for v in spec.strides
            ]
            if spec.dtype is None or spec.device is None:
                inputs.append(sizes[0])
            else:
                inputs.append(shapes.empty(sizes, strides, spec.dtype, spec.device))
        with tracing(TracingContext(shapes.mode)):
            artifact = standalone_compile(
                self._module(shapes, inputs),
                inputs,
                dynamic_shapes="from_tracing_context",
                options=self.cache.options,
            )
        conditions = _conditions(
            shapes, {inner: symbol for symbol, inner in made.items() if isinstance(inner, sympy.Symbol)}
        )
        holds = self._check(examples, conditions)
        self.cache.stats.compilations.append((self.name, time.perf_counter() - start))
        self.cache.stats.conditions.setdefault(self.name, []).extend(map(str, conditions))
        return holds, _boxed(artifact)

    def _module(self, shapes: Shapes, inputs: list[Any]) -> GraphModule:
        """A copy of the graph that the compiler may take apart, with our own operators expressed in ATen."""
        graph = Graph()
        for symbol in self.structure.symbols:
            graph.placeholder(str(symbol))
        graph.output(graph.graph_copy(self.structure.module.graph, {}))
        module = GraphModule(self.structure.module, graph, class_name="Segment")
        reads_places = SDPA in self.decompositions and read_places(graph)
        if reads_places or any(node.target in self.decompositions for node in graph.nodes):
            module.recompile()
            with shapes.mode:
                module = make_fx(module, decomposition_table=dict(self.decompositions), pre_dispatch=True)(
                    *inputs
                )
        return module

    def _check(
        self, examples: Mapping[sympy.Symbol, int], conditions: Sequence[sympy.Basic]
    ) -> Callable[[tuple[int, ...]], bool]:
        tests: list[sympy.Basic] = [
            sympy.Ge(symbol, 2, evaluate=False) if example >= 2 else sympy.Eq(symbol, example, evaluate=False)
            for symbol, example in examples.items()
        ]
        tests += conditions
        places = {symbol: f"sizes[{index}]" for index, symbol in enumerate(self.structure.symbols)}
        function = compile_expressions(
            [sympy.And(*tests, evaluate=False) if tests else sympy.true], places, "sizes"
        )
        return lambda sizes: bool(function(sizes)[0])


def _conditions(shapes: Shapes, back: Mapping[sympy.Symbol, sympy.Symbol]) -> list[sympy.Basic]:
    """The guards of a compilation that do not follow from every symbol being at least 2."""
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
    """The callable inside an artifact that takes a list, so that inputs can be freed while it runs."""
    # AOTAutograd wraps it in functions of *args, which add nothing for a graph without parameters of its own.
    found = getattr(artifact, "_compiled_fn", None)
    while isinstance(found, FunctionType) and found.__code__.co_flags & inspect.CO_VARARGS:
        found = getattr(found, "__wrapped__", None)
    if callable(found) and getattr(found, "_boxed_call", False):
        return cast(Runner, found)
    return lambda args: cast(Sequence[Any], artifact(*args))
