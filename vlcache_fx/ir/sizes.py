"""Sizes as numbers and plain expressions, with which one can calculate without adding a guard.

A size here is an int, a ``SymInt``, or the sympy expression behind it. Expressions know no shape environment:
torch's comparison without guards (``statically_known_true``) does not take them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy

Size: TypeAlias = int | sympy.Expr

_FIRST_HINT = 1021


@functools.cache
def hint(index: int) -> int:
    """The example value of the symbol number ``index``: distinct primes from 1021 on.

    A prime is no multiple of a vector width, no sum of two others and no width of a model, so a condition
    that holds for it by accident is unlikely, and it is large enough that kernels are tuned for long
    sequences.
    """
    return _FIRST_HINT if index == 0 else int(sympy.nextprime(hint(index - 1) + 24))


def expression(size: Any) -> Size:
    """The number or the expression behind a size."""
    if isinstance(size, int):
        return size
    found = size if isinstance(size, sympy.Basic) else size.node.expr
    return int(found) if found.is_number else found


def expressions(sizes: Iterable[Any]) -> list[Size]:
    """``expression`` of each."""
    return [expression(size) for size in sizes]


def evaluated(size: Size, examples: Mapping[sympy.Symbol, int]) -> int | None:
    """The value of a size for these values of its symbols; None where it has a symbol without a value."""
    found = size if isinstance(size, int) else sympy.sympify(size.xreplace(dict(examples)))
    return int(found) if isinstance(found, int) or found.is_number else None


def is_one(size: Any) -> bool:
    """True where the size is the number 1 (a symbol is a length, never 1)."""
    return isinstance(size, int) and size == 1


def equal(left: Any, right: Any) -> bool:
    """Equality as known from the expressions alone."""
    return bool(expression(left) - expression(right) == 0)


def product(sizes: Sequence[Any]) -> Any:
    """Of all sizes; 1 for none."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def quotient(size: Any, divisor: Any) -> Any:
    """``size / divisor`` where it is an integer whatever the symbols in it are; else None."""
    size, divisor = expression(size), expression(divisor)
    if isinstance(size, int) and isinstance(divisor, int):
        return None if divisor == 0 or size % divisor else size // divisor
    if equal(divisor, 0):
        return None
    ratio = sympy.cancel(sympy.sympify(size) / divisor)
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.is_integer and sympy.denom(ratio) == 1 else None
