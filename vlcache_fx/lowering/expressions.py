"""Python code from the size expressions of lowered programs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

__all__ = ["compile_expressions", "is_scalar"]


def is_scalar(value: Any) -> bool:
    """Return True for a number, symbolic or not."""
    return isinstance(value, (bool, int, float, sympy.Expr, torch.SymInt, torch.SymFloat, torch.SymBool))


def compile_expressions(
    expressions: Sequence[sympy.Basic | int], sources: Mapping[sympy.Basic, str], argument: str
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Compile ``expressions`` to one Python function of a sequence named ``argument``.

    ``sources`` maps each symbol to code that reads it from the sequence, such as ``"a[0].size(1)"``. The code
    contains sympy expressions only, never text from users. Not ``sympy.lambdify``: its functions take values,
    and reading these first doubles the time of every call of every segment.

    Raises:
        KeyError: a symbol has no source.
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
