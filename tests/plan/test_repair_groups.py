"""Groups of layers that share their rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.plan import Span, SpanContext, build_plan, token_layer_allowance
from vlcache_fx.plan.repair import checked_rows, grouped_rows

SPAN = Span(0, 3, 12, "key", True)


@dataclass(frozen=True)
class Given:
    """A policy that returns the test's rows."""

    rows: Sequence[Tensor]
    ignores_budget: bool = False

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return self.rows


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[Tensor], tuple[int, ...]]:
    """Any rows per layer, and any groups of these layers."""
    groups = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    drawn = st.lists(st.integers(-1, SPAN.length), max_size=10)
    rows = [torch.tensor(draw(drawn), dtype=torch.int64) for _ in range(sum(groups))]
    return rows, groups


budgets = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@given(choices(), budgets)
def test_grouped_rows_are_nested_and_equal_within_groups(
    choice: tuple[list[Tensor], tuple[int, ...]], budget: float
) -> None:
    chosen, groups = choice
    layers = len(chosen)
    checked, _ = checked_rows(chosen, SPAN, layers, budget, False)
    grouped, notes = grouped_rows(checked, SPAN, groups)
    assert len(grouped) == layers
    for before, after in pairwise(grouped):
        assert torch.isin(after, before).all()
    assert sum(map(len, grouped)) <= token_layer_allowance(budget, SPAN.length, layers)
    ends = list(accumulate(groups))
    for start, end in zip([0, *ends], ends, strict=False):
        assert all(rows is grouped[start] for rows in grouped[start:end])
        assert torch.equal(grouped[start], checked[end - 1])
    dropped = sum(map(len, checked)) - sum(map(len, grouped))
    assert bool(notes) == (dropped > 0)
    assert all(f"dropped {dropped} token-layers" in note for note in notes)


@given(choices(), budgets)
def test_build_plan_with_groups(choice: tuple[list[Tensor], tuple[int, ...]], budget: float) -> None:
    chosen, groups = choice
    plan = build_plan(
        num_tokens=20, spans=[SPAN], num_layers=len(chosen), policy=Given(chosen), budget=budget,
        output_rows=torch.tensor([19]), groups=groups,
    )  # fmt: skip
    ends = list(accumulate(groups))
    for start, end in zip([0, *ends], ends, strict=False):
        assert all(torch.equal(plan.rows[start], rows) for rows in plan.rows[start:end])
        assert all(torch.equal(plan.source[start], source) for source in plan.source[start:end])
        for keep in plan.keep[start : end - 1]:
            assert torch.equal(keep, torch.arange(len(keep)))
    allowed = token_layer_allowance(budget, SPAN.length, len(chosen))
    assert plan.token_layer_fraction * SPAN.length * len(chosen) <= allowed + 1e-9


@given(choices(), budgets)
def test_build_plan_with_groups_of_one_layer(
    choice: tuple[list[Tensor], tuple[int, ...]], budget: float
) -> None:
    chosen, _ = choice
    request: dict[str, Any] = {
        "num_tokens": 20, "spans": [SPAN], "num_layers": len(chosen), "policy": Given(chosen),
        "budget": budget,
    }  # fmt: skip
    plain, grouped = build_plan(**request), build_plan(**request, groups=(1,) * len(chosen))
    assert plain.rows_per_layer == grouped.rows_per_layer
    assert all(torch.equal(a, b) for a, b in zip(plain.rows, grouped.rows, strict=True))
    assert plain.explanations == grouped.explanations


@pytest.mark.parametrize("groups", [(1,), (2, 2), (3, 0), (4, -1), (1, 1, 1, 1)])
def test_grouped_rows_rejects_wrong_groups(groups: tuple[int, ...]) -> None:
    rows = [torch.arange(2)] * 3
    with pytest.raises(PlanError, match="do not make up the 3 layers of the model"):
        grouped_rows(rows, SPAN, groups)
    with pytest.raises(PlanError, match="do not make up the 3 layers"):
        build_plan(num_tokens=20, spans=[SPAN], num_layers=3, policy=Given(rows), budget=1.0, groups=groups)


def test_grouped_rows_explains_dropped_rows() -> None:
    rows = [torch.arange(4), torch.arange(3), torch.arange(1)]
    plan = build_plan(
        num_tokens=20, spans=[SPAN], num_layers=3, policy=Given(rows), budget=1.0, strict=True, groups=(2, 1)
    )
    assert plan.rows_per_layer[:3] == (8 + 3, 8 + 3, 8 + 1)
    assert plan.explanations == (
        "span [3, 15): dropped 1 token-layers, so that each group of layers has one set",
    )
