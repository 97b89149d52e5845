"""Symbolic sizes: a fresh shape environment per trace, and Python code from expressions.

The environment that captured a program belongs to its capture (Dynamo turns its guards into recompiles), so
nothing here ever evaluates a condition in it: expressions are copied into an environment of our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

__all__ = ["Shapes", "Size", "compile_expressions", "evaluated", "expression", "hint", "is_scalar"]

Size: TypeAlias = int | sympy.Expr

_FIRST_HINT = 1021


def hint(index: int) -> int:
    """The example value of the symbol number `index`: distinct primes from 1021 on.

    A prime is no multiple of a vector width, no sum of two others and no width of a model, so a condition
    that holds for it by accident is unlikely, and it is large enough that kernels are tuned for long
    sequences.
    """
    value = _FIRST_HINT
    for _ in range(index):
        value = int(sympy.nextprime(value + 24))
    return value


def is_scalar(value: Any) -> bool:
    """Whether a node's value is a number, symbolic or not."""
    return isinstance(value, (bool, int, float, sympy.Expr, torch.SymInt, torch.SymFloat, torch.SymBool))


def evaluated(size: Size, examples: Mapping[sympy.Symbol, int]) -> int | None:
    """What a size is for these values of its symbols; None where there is one that has none."""
    found = size if isinstance(size, int) else sympy.sympify(size.xreplace(dict(examples)))
    return int(found) if isinstance(found, int) or found.is_number else None


def expression(value: int | torch.SymInt) -> Size:
    """The plain integer or the sympy expression behind a size."""
    if isinstance(value, int):
        return value
    found = value.node.expr
    return int(found) if found.is_number else found


class Shapes:
    """One shape environment and the fake tensor mode that goes with it."""

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)

    def symbol(self, name: str, example: int) -> sympy.Symbol:
        """A new symbol of at least 2, independent of every other one, whatever their examples are."""
        from torch._dynamo.source import ConstantSource  # here: it brings all of Dynamo

        made = self.env.create_symbol(example, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        if not isinstance(made, sympy.Symbol):
            raise ValueError(f"no symbol for the example {example}")
        return made

    def size(self, value: Size, examples: Mapping[sympy.Symbol, int]) -> int | torch.SymInt:
        """A size of this environment; `examples` gives the value of each symbol that no data decides."""
        if isinstance(value, int):
            return value
        if value.is_number:
            return int(value)
        made: int | torch.SymInt = self.env.create_symintnode(value, hint=evaluated(value, examples))
        return made

    def empty(
        self,
        sizes: Sequence[int | torch.SymInt],
        strides: Sequence[int | torch.SymInt],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """A fake tensor without autograd state."""
        with self.mode, torch.no_grad():
            return torch.empty_strided(tuple(sizes), tuple(strides), dtype=dtype, device=device)


def compile_expressions(
    expressions: Sequence[sympy.Basic | int], sources: Mapping[sympy.Basic, str], argument: str
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Compiles expressions to one Python function of a sequence; `sources` says where each symbol is found
    in it.

    The code is printed from sympy expressions alone, never from text of a user.

    Raises:
        KeyError: an expression has a symbol without a source.
    """
    names: dict[sympy.Basic, sympy.Symbol] = {}
    lines: list[str] = []
    printer = PythonPrinter()
    body: list[str] = []
    for item in expressions:
        if isinstance(item, int):
            body.append(repr(item))
            continue
        for symbol in sorted(item.free_symbols, key=str):
            if symbol not in names:
                names[symbol] = sympy.Symbol(f"x{len(names)}", integer=True, positive=True)
                lines.append(f"    x{len(names) - 1} = {sources[symbol]}\n")
        body.append(printer.doprint(item.xreplace(names)))
    code = f"def f({argument}):\n{''.join(lines)}    return ({''.join(f'({b}), ' for b in body)})\n"
    scope: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(code, "<sizes>", "exec"), scope)  # noqa: S102
    made: Callable[[Sequence[Any]], tuple[Any, ...]] = scope["f"]
    return made
