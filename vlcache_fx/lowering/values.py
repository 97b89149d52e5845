"""The fake value of every node of a program, propagated through a shape environment of its own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Interpreter, Node

from vlcache_fx.lowering.shapes import Shapes, Size, expression, hint

__all__ = ["program_values"]

_log = logging.getLogger(__name__)


class _Recorder(Interpreter):
    """Keeps the value of every node; real tensor constants become fake.

    Layers repeat, so an operator is asked once for its result per form of its arguments; symbols that stand
    in the same places are interchangeable there, because no two have the same example.
    """

    def __init__(self, module: GraphModule, shapes: Shapes, examples: Mapping[sympy.Symbol, int]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.shapes, self.examples = shapes, examples
        self.values: dict[Node, Any] = {}
        self._results: dict[Any, Any] = {}
        self._made_already: dict[Any, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = self._operator(n) if n.op == "call_function" else super().run_node(n)
        if n.op == "get_attr" and isinstance(value, torch.Tensor):
            value = self.shapes.mode.from_tensor(value, static_shapes=True)
        self.values[n] = value
        return value

    def _operator(self, node: Node) -> Any:
        symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        try:
            form = (node.target, _form((*args, *sorted(kwargs.items())), symbols))
            known = self._results.get(form)
        except TypeError:  # an argument that has no form
            return super().run_node(node)
        here = (form, *symbols)
        if here not in self._made_already and known is not None:
            self._made_already[here] = self._made(known, {place: one for one, place in symbols.items()})
        if here in self._made_already:
            return self._made_already[here]
        value = super().run_node(node)
        try:
            self._results[form] = _form(value, dict(symbols), new_symbols=False)
        except TypeError:
            return value
        self._made_already[here] = value
        return value

    def _made(self, form: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> Any:
        """A value of ``form``."""

        def size(found: Size) -> int | torch.SymInt:
            return (
                found if isinstance(found, int) else self.shapes.size(found.xreplace(symbols), self.examples)
            )

        match form:
            case _TensorForm(sizes, strides, dtype, device):
                return self.shapes.empty(
                    [size(one) for one in sizes], [size(one) for one in strides], dtype, device
                )
            case sympy.Expr():
                return size(form)
            case tuple():
                return tuple(self._made(part, symbols) for part in form)
        return form


@dataclass(frozen=True, slots=True)
class _TensorForm:
    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device


def _form(value: Any, symbols: dict[sympy.Symbol, sympy.Symbol], *, new_symbols: bool = True) -> Any:
    """What an operator's result depends on beside data: a hashable form, its symbols numbered as they appear.

    Args:
        value: an argument or a result.
        symbols: each symbol's number so far, as a symbol; grows.
        new_symbols: False where a symbol without a number is an error.

    Raises:
        TypeError: a value without a form.
    """

    def size(one: int | torch.SymInt) -> Size:
        found = expression(one)
        if isinstance(found, int):
            return found
        for symbol in sorted(found.free_symbols, key=str):
            if symbol not in symbols:
                if not new_symbols:
                    raise TypeError(f"the symbol {symbol} comes from data")
                symbols[symbol] = _place(len(symbols))
        return found.xreplace(symbols)

    match value:
        case torch.Tensor():
            if value.layout != torch.strided or value.is_conj() or value.is_neg():
                raise TypeError("not a plain tensor")
            sizes, strides = tuple(map(size, value.size())), tuple(map(size, value.stride()))
            return _TensorForm(sizes, strides, value.dtype, value.device)
        case torch.SymInt():
            return size(value)
        case tuple() | list():
            return tuple(_form(part, symbols, new_symbols=new_symbols) for part in value)
        case bool() | float() if new_symbols:
            return (type(value), value)  # 1, 1.0 and True are equal, but not the same argument
        case int() | str() | None | torch.dtype() | torch.device() | torch.layout() | torch.memory_format():
            return value
    raise TypeError(f"{type(value).__name__} has no form")


@functools.cache
def _place(index: int) -> sympy.Symbol:
    return sympy.Symbol(f"place{index}", integer=True, positive=True)


def program_values(program: GraphModule) -> dict[Node, Any]:
    """Propagates fake values through a program, in a new shape environment.

    Each symbol of the placeholders' `meta["val"]` becomes a symbol with a prime example. Where these examples
    contradict a relation between sizes that the program relies on (one symbol is the sum of two others), the
    examples that the capture had are used instead.

    Returns:
        the value of every node.

    Raises:
        ValueError: a placeholder has no `meta["val"]`, or a layout that has no strides.
        Exception: whatever an operator's fake implementation raises.
    """
    try:
        return _propagate(program, Shapes(), captured=False)
    except Exception as error:  # noqa: BLE001 - the second try is the judge
        _log.debug("sizes that are independent primes do not fit (%s): trying those of the capture", error)
        return _propagate(program, Shapes(), captured=True)


def _captured_example(value: torch.SymInt, symbol: sympy.Symbol, default: int) -> int:
    env = value.node.shape_env
    examples = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    return max(2, int(examples.get(symbol, default)))


def _propagate(program: GraphModule, shapes: Shapes, *, captured: bool) -> dict[Node, Any]:
    known: dict[sympy.Symbol, sympy.Symbol] = {}
    examples: dict[sympy.Symbol, int] = {}

    def convert(value: int | torch.SymInt) -> int | torch.SymInt:
        found = expression(value)
        if isinstance(found, int) or isinstance(value, int):
            return int(value)
        for symbol in sorted(found.free_symbols, key=str):
            if symbol not in known:
                example = hint(len(known))
                if captured:
                    example = _captured_example(value, symbol, example)
                known[symbol] = shapes.symbol(f"v{len(known)}", example)
                examples[known[symbol]] = example
        return shapes.size(found.xreplace(known), examples)

    inputs: list[Any] = []
    for node in program.graph.find_nodes(op="placeholder"):
        if "val" not in node.meta:
            raise ValueError(f"the placeholder {node.name!r} has no meta['val']")
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise ValueError(f"the placeholder {node.name!r} has the layout {value.layout}")
            value = shapes.tensor(
                [convert(v) for v in value.size()], [convert(v) for v in value.stride()], value
            )
        elif isinstance(value, torch.SymInt):
            value = convert(value)
        inputs.append(value)
    recorder = _Recorder(program, shapes, examples)
    # The dispatcher in Python knows symbolic sizes where some C++ kernels insist on plain integers.
    with enable_python_dispatcher(), shapes.mode, torch.no_grad():
        recorder.run(*inputs)
    return recorder.values
