"""Metadata of all values of a program: dtype, device, sizes and strides, in symbols of a new environment.

Layers repeat, so the fake implementation of an operator runs once per metadata of its arguments. The rest is
arithmetic on expressions, because creating a fake tensor with symbolic sizes takes a millisecond.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vlcache_fx.ir.fakes import Shapes
from vlcache_fx.ir.nodes import attribute
from vlcache_fx.ir.sizes import Size, evaluated, expression, hint

__all__ = ["ProgramValues", "TensorMeta", "program_values"]

_log = logging.getLogger(__name__)

FROM_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
"""Tags of operators that create symbols."""


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Metadata of a tensor.

    Attributes:
        sizes, strides: per dimension, a number or an expression of the program's symbols.
        dtype, device: dtype and device.
    """

    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ProgramValues:
    """The values of a program's nodes.

    Attributes:
        by_node: ``TensorMeta`` of a tensor, the expression of a symbolic int, a tuple of these for a tuple;
            any other value (a number, the body of a higher-order operator, a tensor without strides) itself.
        examples: a value of each symbol that comes from an input.
    """

    by_node: Mapping[Node, Any]
    examples: Mapping[sympy.Symbol, int]

    def __getitem__(self, node: Node) -> Any:
        return self.by_node[node]

    def example(self, size: Size) -> int | None:
        """Return the value of a size at ``examples``; None if a symbol comes from data."""
        return evaluated(size, self.examples)


def program_values(program: GraphModule) -> ProgramValues:
    """Propagate metadata through a program, in a new shape environment.

    Each symbol of the placeholders' ``meta["val"]`` becomes a symbol with a prime example. If these examples
    contradict a relation of sizes in the program (one symbol is the sum of two others), the examples of the
    capture are used instead.

    Raises:
        ValueError: a placeholder has no ``meta["val"]``, or a layout without strides.
        Exception: any error of an operator's fake implementation.
    """
    try:
        return _Propagation().run(program)
    except Exception as error:  # noqa: BLE001 - the second try raises
        _log.debug("vlcache: independent example sizes do not fit (%s), using those of the capture", error)
        return _Propagation(captured=True).run(program)


@dataclass
class _Propagation:
    """One pass over a program.

    Attributes:
        captured: True to use the examples of the capture.
        known: symbol of the capture -> symbol of the new environment.
        fakes: fake tensors by metadata.
        results: results by operator and arguments, with symbols numbered by first appearance.
        made: results by operator and arguments, with the program's symbols.
    """

    captured: bool = False
    shapes: Shapes = field(default_factory=Shapes)
    examples: dict[sympy.Symbol, int] = field(default_factory=dict)
    known: dict[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    fakes: dict[TensorMeta, torch.Tensor] = field(default_factory=dict)
    results: dict[Any, Any] = field(default_factory=dict)
    made: dict[Any, Any] = field(default_factory=dict)

    def run(self, program: GraphModule) -> ProgramValues:
        values: dict[Node, Any] = {}
        # The Python dispatcher accepts symbolic sizes; some C++ kernels do not.
        with enable_python_dispatcher(), self.shapes.mode, torch.no_grad():
            for node in program.graph.nodes:
                match node.op:
                    case "placeholder":
                        values[node] = self._input(node)
                    case "get_attr":
                        values[node] = self._attribute(program, node)
                    case "call_function":
                        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                        values[node] = self._call(node, args, kwargs)
                    case "output":
                        values[node] = None
                    case other:
                        raise ValueError(f"{node.name!r}: a program has no {other} node")
        return ProgramValues(values, self.examples)

    def _input(self, node: Node) -> Any:
        if "val" not in node.meta:
            raise ValueError(f"the placeholder {node.name!r} has no meta['val']")
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise ValueError(f"the placeholder {node.name!r} has the layout {value.layout}")
            sizes, strides = (tuple(map(self._translated, part)) for part in (value.size(), value.stride()))
            return TensorMeta(sizes, strides, value.dtype, value.device)
        return self._translated(value) if isinstance(value, torch.SymInt) else value

    def _translated(self, value: int | torch.SymInt) -> Size:
        found = expression(value)
        if isinstance(found, int) or isinstance(value, int):
            return int(value)
        for symbol in sorted(found.free_symbols, key=str):
            if symbol not in self.known:
                example = hint(len(self.known))
                if self.captured:
                    example = _captured_example(value, symbol, example)
                self.known[symbol] = self.shapes.symbol(f"v{len(self.known)}", example)
                self.examples[self.known[symbol]] = example
        return found.xreplace(self.known)

    def _attribute(self, program: GraphModule, node: Node) -> Any:
        value = attribute(program, node)
        if not isinstance(value, torch.Tensor):
            return value
        return _meta(self.shapes.mode.from_tensor(value, static_shapes=True))

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        here = _hashable((node.target, args, kwargs))
        if here is None:
            return self._propagated(node, args, kwargs)
        if here not in self.made:
            numbers: dict[sympy.Symbol, sympy.Symbol] = {}
            general = _renamed(here, numbers)
            if general not in self.results:
                value = self._propagated(node, args, kwargs)
                try:
                    self.results[general] = _renamed(value, dict(numbers), complete=True)
                except TypeError:  # a size from data, or a value without metadata
                    return value
                self.made[here] = value
            else:
                symbols = {number: symbol for symbol, number in numbers.items()}
                self.made[here] = _renamed(self.results[general], symbols, complete=True)
        return self.made[here]

    def _propagated(self, node: Node, args: Any, kwargs: Any) -> Any:
        if FROM_DATA & set(getattr(node.target, "tags", ())):
            self.fakes.clear()  # fake tensors cache the symbols from data; equal metadata may need others
        args, kwargs = self._fake(args), self._fake(kwargs)
        return _meta(node.target(*args, **kwargs))  # type: ignore[operator]

    def _fake(self, value: Any) -> Any:
        match value:
            case TensorMeta():
                if value not in self.fakes:
                    sizes, strides = self._fake(value.sizes), self._fake(value.strides)
                    self.fakes[value] = self.shapes.empty(sizes, strides, value.dtype, value.device)
                return self.fakes[value]
            case sympy.Expr():
                return self.shapes.size(value, self.examples)
            case tuple() | list():
                return type(value)(self._fake(part) for part in value)
            case dict():
                return {name: self._fake(part) for name, part in value.items()}
        return value


def _captured_example(value: torch.SymInt, symbol: sympy.Symbol, default: int) -> int:
    env = value.node.shape_env
    examples = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    return max(2, int(examples.get(symbol, default)))


def _meta(value: Any) -> Any:
    match value:
        case torch.Tensor():
            if value.layout != torch.strided or value.is_conj() or value.is_neg():
                return value
            sizes, strides = (tuple(map(expression, part)) for part in (value.size(), value.stride()))
            return TensorMeta(sizes, strides, value.dtype, value.device)
        case torch.SymInt():
            return expression(value)
        case tuple() | list():
            return tuple(map(_meta, value))
    return value


def _hashable(value: Any) -> Any:
    """Return arguments as a hashable key, or None if a value has no such key."""
    match value:
        case tuple() | list():
            parts = tuple(map(_hashable, value))
            return None if any(part is None for part in parts) else parts
        case dict():
            return _hashable(sorted(value.items()))
        case bool() | int() | float():
            return (type(value), value)  # 1, 1.0 and True are equal but different arguments
        case None:
            return ()
        case TensorMeta() | sympy.Expr() | str() | torch.dtype() | torch.device() | torch.layout():
            return value
        case torch.memory_format() | torch._ops.OpOverload():
            return value
    return value if callable(value) and not isinstance(value, torch.nn.Module) else None


def _renamed(value: Any, names: dict[sympy.Symbol, sympy.Symbol], *, complete: bool = False) -> Any:
    """Return ``value`` with its symbols renamed; symbols without a name get the next number.

    Args:
        value: a key, or a value as in ``ProgramValues``.
        names: names of symbols; new names are added.
        complete: True if all symbols must have a name.

    Raises:
        TypeError: a symbol has no name where it must, or a tensor has no metadata.
    """

    def renamed(size: Size) -> Size:
        if isinstance(size, int):
            return size
        for symbol in sorted(size.free_symbols, key=str):
            if symbol not in names:
                if complete:
                    raise TypeError(f"the symbol {symbol} comes from data")
                names[symbol] = _number(len(names))
        return size.xreplace(names)

    match value:
        case TensorMeta():
            sizes, strides = tuple(map(renamed, value.sizes)), tuple(map(renamed, value.strides))
            return TensorMeta(sizes, strides, value.dtype, value.device)
        case sympy.Expr():
            return renamed(value)
        case tuple():
            return tuple(_renamed(part, names, complete=complete) for part in value)
        case torch.Tensor():
            raise TypeError("the tensor has no strides of its own")
    return value


@functools.cache
def _number(index: int) -> sympy.Symbol:
    return sympy.Symbol(f"number{index}", integer=True, positive=True)
