"""Row and token-layer allowances of a budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.plan import row_allowance, token_layer_allowance

shares = st.floats(0, 1)
lengths = st.integers(1, 5000)


@given(shares, lengths)
def test_row_allowance_respects_the_budget(budget: float, length: int) -> None:
    rows = row_allowance(budget, length)
    assert 0 <= rows <= length
    assert (rows == 0) == (budget == 0)
    assert rows <= 1 or rows <= budget * length + 1e-6
    assert rows + 1 > budget * length


@given(shares, lengths, st.integers(1, 40))
def test_token_layer_allowance_respects_the_budget(budget: float, length: int, layers: int) -> None:
    allowed = token_layer_allowance(budget, length, layers)
    assert row_allowance(budget, length) * layers <= allowed <= length * layers
    assert allowed <= max(budget * length * layers + 1e-6, layers if budget else 0)


@pytest.mark.parametrize(
    ("budget", "length", "rows"), [(0.29, 100, 29), (0.1, 30, 3), (0.02, 16, 1), (1, 7, 7)]
)
def test_row_allowance_rounding(budget: float, length: int, rows: int) -> None:
    assert row_allowance(budget, length) == rows


def test_allowances_of_an_empty_span() -> None:
    assert row_allowance(0.5, 0) == 0
