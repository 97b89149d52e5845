"""The form of every value of a program: dtype, device, sizes and strides, in a new environment's symbols.

Layers repeat, so an operator is asked for its result once per form of its arguments. All else is arithmetic
on expressions: a fake tensor is only made where an operator has to be asked, since making one with symbolic
sizes takes a millisecond.
"""

from __future__ import annotations

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
"""Operators that make new symbols."""


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """What operators see of a tensor.

    Attributes:
        sizes, strides: one per dimension; numbers, or expressions of the program's symbols.
    """

    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ProgramValues:
    """The values of a program's nodes.

    Attributes:
        by_node: of a tensor its form, of a symbolic int its expression, of a tuple a tuple; anything else (a
            number, the body of a higher-order operator, a tensor that has no strides of its own) as it is.
        examples: a value of each symbol that comes from an input.
    """

    by_node: Mapping[Node, Any]
    examples: Mapping[sympy.Symbol, int]

    def __getitem__(self, node: Node) -> Any:
        return self.by_node[node]

    def example(self, size: Size) -> int | None:
        """What a size is where symbols have their examples; None where one comes from data."""
        return evaluated(size, self.examples)


def program_values(program: GraphModule) -> ProgramValues:
    """Propagates forms through a program, in a new shape environment.

    Each symbol of the placeholders' `meta["val"]` becomes a symbol with a prime example. Where these examples
    contradict a relation between sizes that the program relies on (one symbol is the sum of two others), the
    examples that the capture had are used instead.

    Raises:
        ValueError: a placeholder has no `meta["val"]`, or a layout that has no strides.
        Exception: whatever an operator's fake implementation raises.
    """
    try:
        return _Propagation().run(program)
    except Exception as error:  # noqa: BLE001 - the second try is the judge
        _log.debug("sizes that are independent primes do not fit (%s): trying those of the capture", error)
        return _Propagation(captured=True).run(program)


@dataclass
class _Propagation:
    """One way through a program.

    Attributes:
        captured: symbols have the examples that the capture had.
        known: symbols of the capture, and what they are here.
        fakes: the fake tensor of every form that an operator was asked about.
        results: per operator and arguments, with symbols numbered as they appear, the result in numbers.
        made: the result per operator and arguments as they are.
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
        # The dispatcher in Python knows symbolic sizes where some C++ kernels insist on plain integers.
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
        return _form(self.shapes.mode.from_tensor(value, static_shapes=True))

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        here = _hashable((node.target, args, kwargs))
        if here is None:
            return self._asked(node, args, kwargs)
        if here not in self.made:
            numbers: dict[sympy.Symbol, sympy.Symbol] = {}
            general = _renamed(here, numbers)
            if general not in self.results:
                value = self._asked(node, args, kwargs)
                try:
                    self.results[general] = _renamed(value, dict(numbers), complete=True)
                except TypeError:  # it has a size that comes from data, or no form
                    return value
                self.made[here] = value
            else:
                symbols = {number: symbol for symbol, number in numbers.items()}
                self.made[here] = _renamed(self.results[general], symbols, complete=True)
        return self.made[here]

    def _asked(self, node: Node, args: Any, kwargs: Any) -> Any:
        if FROM_DATA & set(getattr(node.target, "tags", ())):
            self.fakes.clear()  # they remember the symbols made for them; other tensors have others
        args, kwargs = self._fake(args), self._fake(kwargs)
        return _form(node.target(*args, **kwargs))  # type: ignore[operator]

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
                return type(value)(self._fake(one) for one in value)
            case dict():
                return {name: self._fake(one) for name, one in value.items()}
        return value


def _captured_example(value: torch.SymInt, symbol: sympy.Symbol, default: int) -> int:
    env = value.node.shape_env
    examples = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    return max(2, int(examples.get(symbol, default)))


def _form(value: Any) -> Any:
    match value:
        case torch.Tensor():
            if value.layout != torch.strided or value.is_conj() or value.is_neg():
                return value
            sizes, strides = (tuple(map(expression, part)) for part in (value.size(), value.stride()))
            return TensorMeta(sizes, strides, value.dtype, value.device)
        case torch.SymInt():
            return expression(value)
        case tuple() | list():
            return tuple(map(_form, value))
    return value


def _hashable(value: Any) -> Any:
    """Arguments as a key; None where one has no form."""
    match value:
        case tuple() | list():
            parts = tuple(map(_hashable, value))
            return None if any(part is None for part in parts) else parts
        case dict():
            return _hashable(sorted(value.items()))
        case bool() | int() | float():
            return (type(value), value)  # 1, 1.0 and True are equal, but not the same argument
        case None:
            return ()
        case TensorMeta() | sympy.Expr() | str() | torch.dtype() | torch.device() | torch.layout():
            return value
        case torch.memory_format() | torch._ops.OpOverload():
            return value
    return value if callable(value) and not isinstance(value, torch.nn.Module) else None


def _renamed(value: Any, names: dict[sympy.Symbol, sympy.Symbol], *, complete: bool = False) -> Any:
    """The same with its symbols renamed; those without a name get the next number.

    Args:
        value: a key or a form.
        names: grows.
        complete: a symbol without a name is an error.

    Raises:
        TypeError: such a symbol, or a value that has no form.
    """

    def size(one: Size) -> Size:
        if isinstance(one, int):
            return one
        for symbol in sorted(one.free_symbols, key=str):
            if symbol not in names:
                if complete:
                    raise TypeError(f"the symbol {symbol} comes from data")
                names[symbol] = _number(len(names))
        return one.xreplace(names)

    match value:
        case TensorMeta():
            sizes, strides = tuple(map(size, value.sizes)), tuple(map(size, value.strides))
            return TensorMeta(sizes, strides, value.dtype, value.device)
        case sympy.Expr():
            return size(value)
        case tuple():
            return tuple(_renamed(part, names, complete=complete) for part in value)
        case torch.Tensor():
            raise TypeError("not a plain tensor")
    return value


@functools.cache
def _number(index: int) -> sympy.Symbol:
    return sympy.Symbol(f"place{index}", integer=True, positive=True)
