"""Stacked plans contain the plan of each sample."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_fx.plan import Plan, Span, build_plan
from vlcache_fx.plan.stack import stack_plans
from vlcache_fx.policies.none import NoRows
from vlcache_fx.policies.uniform import Uniform

from .test_build import Given, ids


def hit(sample: int, start: int, length: int) -> Span:
    return Span(sample, start, length, "key", True)


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    """One to four samples of equal length, with or without a span, each with its own rows per layer."""
    tokens, layers, first = draw(st.integers(4, 12)), draw(st.integers(1, 4)), 0
    last_only = draw(st.booleans())
    made = []
    for sample in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, tokens - 1))
        length = draw(st.integers(0, tokens - start))
        rows = [ids(*draw(st.sets(st.integers(0, 11)))) for _ in range(layers)]
        made.append(
            build_plan(
                num_tokens=tokens,
                spans=[hit(sample, start, length)] if length else [],
                num_layers=layers,
                policy=Given(rows, ignores_budget=True),
                budget=1.0,
                output_rows=ids(tokens - 1) if last_only else None,
                first_donor=first,
            )
        )
        first += length
    return made


@given(plans())
def test_stack_plans_keeps_rows_of_each_plan(own: list[Plan]) -> None:
    stacked = stack_plans(own)
    assert stacked.plans == tuple(own)
    assert len(stacked.rows) == len(stacked.source) == len(own[0].rows)
    for level, rows in enumerate(stacked.rows):
        assert rows.shape == (len(own), max(plan.rows_per_layer[level] for plan in own))
        assert stacked.rows_per_layer[level] == rows.shape[1]
        for plan, filled in zip(own, rows, strict=True):
            count = plan.rows_per_layer[level]
            assert torch.equal(filled[:count], plan.rows[level])
            assert filled[count:].tolist() == [plan.rows[level][-1].item()] * (rows.shape[1] - count)


@given(plans())
def test_stack_plans_keep_indices(own: list[Plan]) -> None:
    stacked = stack_plans(own)
    assert len(stacked.keep) == len(own[0].keep)
    for (before, after), keep in zip(pairwise(stacked.rows), stacked.keep, strict=True):
        assert torch.equal(before.gather(1, keep), after)


@given(plans())
@settings(max_examples=25)
def test_stack_plans_source(own: list[Plan]) -> None:
    stacked = stack_plans(own)
    for rows, source, *alone in zip(
        stacked.rows, stacked.source, *(plan.source for plan in own), strict=True
    ):
        assert torch.equal(source, torch.stack(alone))
        computed = source < 0
        tokens = torch.arange(source.shape[1]).expand_as(source)
        assert torch.equal(rows.gather(1, (-1 - source).clamp(min=0))[computed], tokens[computed])


def plan_of(policy: Any, first: int = 0, start: int = 2) -> Plan:
    return build_plan(
        num_tokens=10, spans=[hit(0, start, 6)], num_layers=3, policy=policy, budget=0.4, first_donor=first
    )


def test_stack_plans_shares_tensors_of_equal_layers() -> None:
    stacked = stack_plans([plan_of(Uniform()), plan_of(NoRows(), first=6)])
    assert all(rows is stacked.rows[0] for rows in stacked.rows)
    assert all(source is stacked.source[0] for source in stacked.source)
    assert all(keep is stacked.keep[0] for keep in stacked.keep)
    shrinking = plan_of(Given([ids(0, 1), ids(0), ids(0)], ignores_budget=True))
    mixed = stack_plans([plan_of(Uniform()), shrinking])
    assert mixed.rows[0] is not mixed.rows[1]
    assert mixed.rows[1] is mixed.rows[2]


def test_stack_plans_repeats_the_last_row() -> None:
    stacked = stack_plans([plan_of(Uniform()), plan_of(NoRows(), first=6, start=4)])
    assert stacked.rows[0].tolist() == [[0, 1, 2, 3, 8, 9], [0, 1, 2, 3, 3, 3]]
    assert stacked.keep[0].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 3, 3]]
    assert stacked.source[0].tolist() == [
        [-1, -2, -3, -4, 2, 3, 4, 5, -5, -6],
        [-1, -2, -3, -4, 6, 7, 8, 9, 10, 11],
    ]


def test_stack_plans_of_one_plan() -> None:
    alone = plan_of(Uniform())
    stacked = stack_plans([alone])
    for name in ("rows", "keep", "source"):
        for wide, narrow in zip(getattr(stacked, name), getattr(alone, name), strict=True):
            assert torch.equal(wide, narrow[None])
