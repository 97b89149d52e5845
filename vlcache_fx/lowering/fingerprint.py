"""Structure of a segment as canonical text. Segments with equal text share a compilation.

The text contains the operators in order, their connections, all constants, and the kind, dtype, device, sizes
and strides of each input, with symbols numbered by first appearance. It contains no weights, names or example
sizes, so all decoder layers of one shape have the same text.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from vlcache_fx.ir.digest import argument_text, target_text
from vlcache_fx.ir.nodes import attribute
from vlcache_fx.ir.sizes import Size, hint
from vlcache_fx.lowering.outline import Segment
from vlcache_fx.lowering.values import ProgramValues, TensorMeta

__all__ = ["InputSpec", "Structure", "structure_of"]


@dataclass(frozen=True)
class InputSpec:
    """An input of a segment, in the canonical symbols of the structure.

    Attributes:
        sizes: sizes of a tensor, or the expression of an int.
        strides: strides of a tensor; empty for an int.
        dtype, device: dtype and device of a tensor; None for an int.
    """

    sizes: tuple[Size, ...]
    strides: tuple[Size, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __str__(self) -> str:
        if self.dtype is None:
            return f"int {self.sizes[0]}"
        return f"{self.dtype} {self.device} {self.sizes} {self.strides}"


@dataclass(frozen=True)
class Structure:
    """Common structure of equal segments.

    Attributes:
        key: digest of ``text``.
        text: the canonical text.
        module: graph of the first such segment.
        inputs: inputs of the segment.
        symbols: the canonical symbols.
        examples: a valid value of each symbol, for structures that independent primes do not fit.
        sources: Python code that reads each symbol from the list ``a`` of arguments.
    """

    key: str
    text: str = field(repr=False)
    module: GraphModule = field(repr=False)
    inputs: tuple[InputSpec, ...]
    symbols: tuple[sympy.Symbol, ...]
    examples: Mapping[sympy.Symbol, int]
    sources: Mapping[sympy.Symbol, str]


def structure_of(segment: Segment, values: ProgramValues, context: str = "") -> Structure:
    """Return the structure of a segment.

    Args:
        segment: a segment of a program.
        values: values of that program.
        context: text for everything else that a compilation depends on.
    """
    naming = _Naming(values)
    described = [naming.describe(index, value) for index, value in enumerate(segment.values)]
    inputs = tuple(
        replace(spec, sizes=naming.all(spec.sizes), strides=naming.all(spec.strides)) for spec in described
    )
    lines = [context, *map(str, inputs), _graph_text(segment.module)]
    text = "\n".join(lines)
    key = hashlib.sha256(text.encode()).hexdigest()
    return Structure(
        key, text, segment.module, inputs, tuple(naming.symbols), naming.examples, naming.sources
    )


class _Naming:
    """Canonical symbols. An expression with symbols that are no size of an input becomes a new symbol."""

    def __init__(self, values: ProgramValues) -> None:
        self.values = values
        self.names: dict[sympy.Expr, sympy.Symbol] = {}
        self.symbols: list[sympy.Symbol] = []
        self.examples: dict[sympy.Symbol, int] = {}
        self.sources: dict[sympy.Symbol, str] = {}
        self.expression_sources: dict[sympy.Expr, str] = {}

    def describe(self, index: int, value: TensorMeta | Size) -> InputSpec:
        """Name the symbols that are sizes of an input; its expressions keep the program's symbols for now."""
        if not isinstance(value, TensorMeta):
            return InputSpec((self._note(value, f"a[{index}]"),))
        sizes = [self._note(size, f"a[{index}].size({dim})") for dim, size in enumerate(value.sizes)]
        strides: list[Size] = []
        for dim, stride in enumerate(value.strides):
            if sizes[dim] == 1:  # the stride is arbitrary: use that of a contiguous tensor
                strides.append(math.prod(sizes[dim + 1 :]))
            else:
                if not isinstance(stride, int):
                    self.expression_sources.setdefault(stride, f"a[{index}].stride({dim})")
                strides.append(stride)
        return InputSpec(tuple(sizes), tuple(strides), value.dtype, value.device)

    def _note(self, size: Size, source: str) -> Size:
        if not isinstance(size, int):
            self.expression_sources.setdefault(size, source)
            if isinstance(size, sympy.Symbol) and size not in self.names:
                self._new(size)
        return size

    def _new(self, found: sympy.Expr) -> sympy.Symbol:
        made = sympy.Symbol(f"s{len(self.symbols)}", integer=True, positive=True)
        self.names[found] = made
        self.sources[made] = self.expression_sources[found]
        known = self.values.example(found)
        self.examples[made] = hint(len(self.symbols)) if known is None else known
        self.symbols.append(made)
        return made

    def all(self, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
        """Rename expressions. An expression with an unnamed symbol becomes a new symbol as a whole."""
        renamed: list[Size] = []
        for size in sizes:
            if isinstance(size, int) or size.is_number:
                renamed.append(int(size))
            elif size in self.names:
                renamed.append(self.names[size])
            elif size.free_symbols <= self.names.keys():
                renamed.append(size.xreplace(self.names))
            else:
                renamed.append(self._new(size))
        return tuple(renamed)


def _graph_text(module: GraphModule) -> str:
    """Return the text of all nodes in graph order, on which the compiler's code depends."""
    ids: dict[Node, int] = {}

    def leaf(value: Any) -> str:
        return f"%{ids[value]}" if isinstance(value, Node) else repr(value)

    lines: list[str] = []
    for node in module.graph.nodes:
        ids[node] = len(ids)
        match node.op:
            case "placeholder":
                continue
            case "call_function":
                what = target_text(node.target)
            case "get_attr":
                what = f"({_graph_text(attribute(module, node))})"
            case other:
                what = other
        lines.append(f"{what} {argument_text(node.args, leaf)} {argument_text(node.kwargs, leaf)}")
    return "\n".join(lines)
