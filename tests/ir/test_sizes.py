"""Sizes as expressions: facts for all values of their symbols."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.ir.fakes import FakeInputs
from vlcache_fx.ir.sizes import equal, expressions, product, quotient

S, T = sympy.symbols("s t", integer=True, positive=True)
numbers = st.integers(1, 12)
monomials = st.builds(lambda c, a, b: c * S**a * T**b, numbers, st.integers(0, 2), st.integers(0, 2))
sums = st.lists(monomials, min_size=1, max_size=3).map(sum)


@given(sums, monomials)
def test_quotient_of_product_by_factor(size: sympy.Expr, factor: sympy.Expr) -> None:
    assert equal(quotient(sympy.expand(size * factor), factor), size)


@given(sums, sums, numbers, numbers)
def test_quotient_for_every_symbol_value(size: sympy.Expr, divisor: sympy.Expr, s: int, t: int) -> None:
    found = quotient(size, divisor)
    if found is not None:
        value, of, by = (sympy.sympify(one).subs({S: s, T: t}) for one in (found, size, divisor))
        assert value.is_integer
        assert value * by == of


@given(numbers, st.integers(0, 12))
def test_quotient_of_numbers(size: int, divisor: int) -> None:
    whole = divisor and not size % divisor
    assert quotient(size, divisor) == (size // divisor if whole else None)


@pytest.mark.parametrize(
    ("size", "divisor", "expected"),
    [
        (S, 2, None),
        (3 * S, 2, None),
        (S + 1, S, None),
        (1, S, None),
        (S, T, None),
        (S, 0, None),
        (S, S - S, None),
        (0, S, 0),
        (4 * S, 2 * S, 2),
        (2 * S * T, S, 2 * T),
        (S * T + T, S + 1, T),
    ],
)
def test_quotient(size: object, divisor: object, expected: object) -> None:
    assert quotient(size, divisor) == expected


def test_equal_without_guard() -> None:
    fakes = FakeInputs()
    tokens, other = fakes.size("tokens"), fakes.size("other")
    assert equal(2 * tokens - tokens, tokens)
    assert equal(tokens + other, other + tokens)
    assert not equal(tokens, other)
    assert not equal(tokens, tokens.node.hint)  # equal to its hint by accident
    assert quotient(tokens * 6, tokens * 2) == 3
    assert quotient(tokens * other, 2) is None
    assert fakes.env.guards == []


def test_product_and_expressions() -> None:
    tokens = FakeInputs().size("tokens")
    assert product([]) == 1
    assert product([2, S, 3]) == 6 * S
    assert expressions([2, tokens]) == [2, tokens.node.expr]
