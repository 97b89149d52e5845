"""Arithmetic on sizes without guards.

A size is an int, a ``SymInt``, or the sympy expression of one. Expressions have no shape environment, so
``statically_known_true``, torch's comparison without guards, does not apply.
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
    """Return the example value of symbol ``index``: distinct primes from 1021 on.

    A prime is no multiple of a vector width, no sum of two others and no width of a model, so conditions
    rarely hold by accident; and it is large enough to tune kernels for long sequences.
    """
    return _FIRST_HINT if index == 0 else int(sympy.nextprime(hint(index - 1) + 24))


def expression(size: Any) -> Size:
    """Return a size as a number or a sympy expression."""
    if isinstance(size, int):
        return size
    found = size if isinstance(size, sympy.Basic) else size.node.expr
    return int(found) if found.is_number else found


def expressions(sizes: Iterable[Any]) -> list[Size]:
    """Return ``expression`` of each size."""
    return [expression(size) for size in sizes]


def evaluated(size: Size, examples: Mapping[sympy.Symbol, int]) -> int | None:
    """Return the value of a size for ``examples`` of its symbols; None if a symbol has no example."""
    found = size if isinstance(size, int) else sympy.sympify(size.xreplace(dict(examples)))
    return int(found) if isinstance(found, int) or found.is_number else None


def is_one(size: Any) -> bool:
    """Return True for the number 1; symbols are lengths, never 1."""
    return isinstance(size, int) and size == 1


def equal(left: Any, right: Any) -> bool:
    """Return True if the expressions are equal for all values of their symbols."""
    return bool(expression(left) - expression(right) == 0)


def product(sizes: Sequence[Any]) -> Any:
    """Return the product of all sizes; 1 for none."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def quotient(size: Any, divisor: Any) -> Any:
    """Return ``size / divisor`` if it is an integer for all values of its symbols; else None."""
    size, divisor = expression(size), expression(divisor)
    if isinstance(size, int) and isinstance(divisor, int):
        return None if divisor == 0 or size % divisor else size // divisor
    if equal(divisor, 0):
        return None
    ratio = sympy.cancel(sympy.sympify(size) / divisor)
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.is_integer and sympy.denom(ratio) == 1 else None
