"""The Inductor lowering: segments of equal structure share a compilation; weights are inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from vlcache_fx.compiling import compiling, missing_tool
from vlcache_fx.errors import LoweringError, NoCompilerError
from vlcache_fx.ir.nodes import attribute
from vlcache_fx.keys.numerics import numerics
from vlcache_fx.lowering.base import Decompositions
from vlcache_fx.lowering.cache import CompileCache
from vlcache_fx.lowering.expressions import compile_expressions, is_scalar
from vlcache_fx.lowering.fingerprint import structure_of
from vlcache_fx.lowering.outline import Segment, outline
from vlcache_fx.lowering.values import ProgramValues, TensorMeta, program_values
from vlcache_fx.runtime.programs.lowered import Lowered, PendingTensor, current_check, resolved

__all__ = ["InductorLowering"]


class InductorLowering:
    """Lowering that cuts a program into segments and compiles each distinct structure once.

    Args:
        cache: cache of the compilations, shared by all lowerings of a backend.
        decompositions: operators to replace by ATen before compilation.
    """

    name = "inductor"

    def __init__(
        self, cache: CompileCache | None = None, decompositions: Decompositions | None = None
    ) -> None:
        self.cache = cache if cache is not None else CompileCache()
        self.decompositions = dict(decompositions or {})

    def lower(self, program: GraphModule, *, name: str) -> Lowered:
        """See ``Lowering.lower``. Compiles all segments; calls compile only for sizes that break a condition.

        Raises:
            LoweringError: see ``Lowering.lower``.
            NoCompilerError: the machine has no compiler.
        """
        with compiling():
            return self._lower(program, name)

    def _lower(self, program: GraphModule, name: str) -> Lowered:
        try:
            values = program_values(program)
            segments = outline(program, values)
            builder = _Assembler(program, values)
        except Exception as error:
            raise LoweringError(f"program {name!r}: cannot be outlined: {_brief(error)}") from error
        context = f"{_context(self.cache)} {sorted(map(str, self.decompositions))}"
        for segment in segments:
            try:
                run = self.cache.get(
                    structure_of(segment, values, context), f"{name}/{segment.name}", self.decompositions
                )
                builder.add(segment, run)
            except Exception as error:
                missing = missing_tool(error)
                if missing is not None:
                    raise NoCompilerError(missing) from error
                raise LoweringError(f"program {name!r}, segment {segment.name!r}: {_brief(error)}") from error
        try:
            return builder.finish()
        except Exception as error:
            raise LoweringError(f"program {name!r}: cannot be bound: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 2000 else text[:2000] + " ..."


def _context(cache: CompileCache) -> str:
    """Return the global settings that compiled code depends on."""
    return repr(
        (
            sorted(cache.options.items(), key=lambda item: item[0]),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            numerics("cuda"),
        )
    )


@dataclass(frozen=True, slots=True)
class _Step:
    run: Callable[[list[Any]], Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


class _Assembler:
    """Assigns a slot to every value that crosses a segment, and builds the steps of the program."""

    def __init__(self, program: GraphModule, values: ProgramValues) -> None:
        self.program, self.values = program, values
        self.placeholders = program.graph.find_nodes(op="placeholder")
        self.slots: dict[Any, int] = {node: index for index, node in enumerate(self.placeholders)}
        self.constants: list[Any] = []
        self.numbers: list[sympy.Expr] = []
        self.parts: list[tuple[Callable[[list[Any]], Sequence[Any]], tuple[Any, ...], tuple[Node, ...]]] = []

    def add(self, segment: Segment, run: Callable[[list[Any]], Sequence[Any]]) -> None:
        self.parts.append((run, segment.inputs, segment.outputs))

    def finish(self) -> Lowered:
        results = next(iter(self.program.graph.find_nodes(op="output"))).args[0]
        results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        returned = [self._key(value) for value in results]
        used = [*(key for _, inputs, _ in self.parts for key in inputs), *returned]
        first = len(self.placeholders)
        for key in used:
            if key in self.slots or (isinstance(key, Node) and key.op == "call_function"):
                continue
            self.slots[key] = first + len(self.constants) + len(self.numbers)
            if isinstance(key, Node):
                self.constants.append(self._constant(key))
            elif isinstance(key, sympy.Expr):
                self.numbers.append(key)
            else:
                self.constants.append(key.value)
        # The environment of a call contains constants before numbers.
        order = [key for key in self.slots if not isinstance(key, sympy.Expr)]
        order += [key for key in self.slots if isinstance(key, sympy.Expr)]
        self.slots = {key: index for index, key in enumerate(order)}
        for _, _, outputs in self.parts:
            for node in outputs:
                self.slots.setdefault(node, len(self.slots))
        steps = self._steps([self.slots[key] for key in returned])
        return _Program(
            steps,
            tuple(self.slots[key] for key in returned),
            tuple(self.constants),
            len(self.slots),
            len(self.placeholders),
            self._numbers(),
            _layouts(self.values, self.placeholders),
        )

    def _key(self, value: Any) -> Any:
        if not isinstance(value, Node):
            return _Literal(value)
        if is_scalar(self.values[value]) and value.op != "placeholder":
            found = self.values[value]
            return found if isinstance(found, sympy.Expr) else _Literal(found)
        return value

    def _constant(self, node: Node) -> Any:
        value = attribute(self.program, node)
        return value.detach() if isinstance(value, torch.Tensor) else value

    def _steps(self, returned: list[int]) -> tuple[_Step, ...]:
        last = {self.slots[key]: i for i, (_, inputs, _) in enumerate(self.parts) for key in inputs}
        last.update(
            (self.slots[node], i)
            for i, (_, _, outs) in enumerate(self.parts)
            for node in outs
            if self.slots[node] not in last
        )
        dead: list[list[int]] = [[] for _ in self.parts]
        for slot, step in last.items():
            if slot not in returned:
                dead[step].append(slot)
        return tuple(
            _Step(
                run, tuple(self.slots[k] for k in inputs), tuple(self.slots[n] for n in outs), tuple(dead[i])
            )
            for i, (run, inputs, outs) in enumerate(self.parts)
        )

    def _numbers(self) -> Callable[[Sequence[Any]], tuple[Any, ...]] | None:
        if not self.numbers:
            return None
        sources: dict[sympy.Basic, str] = {}
        for index, node in enumerate(self.placeholders):
            value = self.values[node]
            if isinstance(value, sympy.Expr):
                sources.setdefault(value, f"a[{index}]")
            elif isinstance(value, TensorMeta):
                for dim, size in enumerate(value.sizes):
                    if not isinstance(size, int):
                        sources.setdefault(size, f"a[{index}].size({dim})")
        return compile_expressions(self.numbers, sources, "a")


@dataclass(frozen=True, eq=False)
class _Literal:
    value: Any


def _layouts(
    values: ProgramValues, placeholders: Sequence[Node]
) -> tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]:
    """Return ``(input, order, inverse order)`` of the inputs that need the layout of the compilation.

    Only inputs with a symbolic size: all others keep their layout.
    """
    found = []
    for index, node in enumerate(placeholders):
        meta = values[node]
        if not isinstance(meta, TensorMeta) or all(isinstance(size, int) for size in meta.sizes):
            continue
        sizes, strides = ([values.example(size) or 0 for size in part] for part in (meta.sizes, meta.strides))
        order = tuple(sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim)))
        example = torch.empty_strided(sizes, strides, device="meta")
        if example.permute(order).is_contiguous():
            found.append((index, order, tuple(order.index(dim) for dim in range(len(order)))))
    return tuple(found)


class _Program:
    """A lowered program: runs its steps on an environment of slots and frees values during their last use.

    Code from ``torch.fx`` frees a value after the last call that reads it, so the value would take memory
    while the segment runs.
    """

    def __init__(
        self,
        steps: tuple[_Step, ...],
        returned: tuple[int, ...],
        constants: tuple[Any, ...],
        slots: int,
        inputs: int,
        numbers: Callable[[Sequence[Any]], tuple[Any, ...]] | None,
        layouts: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...],
    ) -> None:
        self.steps, self.returned, self.constants = steps, returned, constants
        self.numbers, self.layouts, self.inputs = numbers, layouts, inputs
        self.rest = [None] * slots

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        if len(args) != self.inputs:
            raise LoweringError(f"the program takes {self.inputs} inputs, not {len(args)}")
        values: list[Any] = [*args, *self.constants, *(self.numbers(args) if self.numbers else ())]
        values += self.rest[len(values) :]
        with torch.no_grad():
            for index, order, inverse in self.layouts:
                if isinstance(values[index], PendingTensor):
                    continue
                ordered = values[index].permute(order)
                if not ordered.is_contiguous():
                    values[index] = ordered.contiguous().permute(inverse)
            check = current_check()
            for step in self.steps:
                if check is not None:
                    check()
                taken = [resolved(values[index]) for index in step.inputs]
                for index in step.dead:
                    values[index] = None
                for index, result in zip(step.outputs, step.run(taken), strict=True):
                    values[index] = result
        return tuple([values[index] for index in self.returned])
