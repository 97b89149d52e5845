"""Numbers and expressions in lowered programs, and Python code from expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

__all__ = ["compile_expressions", "is_scalar"]


def is_scalar(value: Any) -> bool:
    """Whether a node's value is a number, symbolic or not."""
    return isinstance(value, (bool, int, float, sympy.Expr, torch.SymInt, torch.SymFloat, torch.SymBool))


def compile_expressions(
    expressions: Sequence[sympy.Basic | int], sources: Mapping[sympy.Basic, str], argument: str
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Compiles expressions to one Python function of a sequence; `sources` says where each symbol is found
    in it.

    The code is printed from sympy expressions alone, never from text of a user. ``sympy.lambdify`` makes
    functions of values: reading these first takes as long again, in every call of every segment.

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
