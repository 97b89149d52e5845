"""Jumps and records of recurrent decoders: the index tensors that programs read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.errors import PlanError
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.jumps import (
    Jump,
    Record,
    chosen_cut,
    cuts_of,
    joined,
    jump_at,
    last,
    own,
    record_bounds,
    records_of,
)
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.policies import get_policy

WIDTH = 4


def rows_of(num_tokens: int, jumps: list[Jump]) -> torch.Tensor:
    skipped = {token for jump in jumps for token in range(jump.start, jump.end)}
    return torch.tensor([token for token in range(num_tokens) if token not in skipped])


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[Jump]]:
    """A number of tokens and jumps between computed ones, the first possibly over a prefix."""
    at, jumps = draw(st.integers(0, 3)), []
    for number in range(draw(st.integers(0, 4))):
        start = at + draw(st.integers(0 if number == 0 else 1, 5))
        at = start + draw(st.integers(1, 30))
        jumps.append(Jump(start, at, (2 * number, 2 * number + 1), number))
    return at + draw(st.integers(2, 20)), jumps


@given(prompts())
def test_convolutions_see_the_rows_before(prompt: tuple[int, list[Jump]]) -> None:
    """Each computed row finds its last inputs in the joined rows: computed ones, or those of a jump's end."""
    num_tokens, jumps = prompt
    rows = rows_of(num_tokens, jumps)
    source, index = joined(jumps, rows, WIDTH), own(jumps, rows, WIDTH)
    stored = {jump.tail * WIDTH + w: jump.end - WIDTH + w for jump in jumps for w in range(WIDTH)}
    tokens = [stored[value] if value >= 0 else int(rows[-value - 1]) for value in source.tolist()]
    assert [tokens[at] for at in index.tolist()] == rows.tolist()
    for at in index.tolist():
        window = tokens[max(0, at - WIDTH + 1) : at + 1]
        assert window == list(range(tokens[at] - len(window) + 1, tokens[at] + 1))
        # What is missing are tokens before the prompt, or rows before a jump that begins right here.
        assert len(window) == WIDTH or tokens[at] < WIDTH


@given(prompts())
def test_states_jump_before_the_next_row(prompt: tuple[int, list[Jump]]) -> None:
    num_tokens, jumps = prompt
    rows = rows_of(num_tokens, jumps)
    at, maps = (tensor[0].tolist() for tensor in jump_at(jumps, rows))
    assert len(at) == len(maps) >= 2
    assert at == sorted(at)
    found = [(place, number) for place, number in zip(at, maps, strict=True) if number >= 0]
    assert [number for _, number in found] == [number for jump in jumps for number in jump.maps]
    for (place, _), jump in zip(found[::2], jumps, strict=True):
        assert rows[:place].lt(jump.end).all()
        assert rows[place:].ge(jump.end).all()


@given(prompts(), st.data())
def test_records_in_computed_rows(prompt: tuple[int, list[Jump]], data: st.DataObject) -> None:
    num_tokens, jumps = prompt
    first = jumps[-1].end if jumps else 0
    start = data.draw(st.integers(first, num_tokens - 1))
    records = [Record(start, data.draw(st.integers(start + 1, num_tokens)))]
    rows = rows_of(num_tokens, jumps)
    starts, ends = record_bounds(records, rows)
    assert starts.shape == ends.shape == (1, 2)
    assert rows[starts[0, 0] : ends[0, 0]].tolist() == list(range(start, records[0].end))
    source = joined(jumps, rows, WIDTH)
    stored = {jump.tail * WIDTH + w: jump.end - WIDTH + w for jump in jumps for w in range(WIDTH)}
    tokens: list[int] = [-1] * WIDTH  # zeros, as for tokens before the prompt
    tokens += [stored[value] if value >= 0 else int(rows[-value - 1]) for value in source.tolist()]
    found = [tokens[at] for at in last(records, jumps, rows, WIDTH)[:WIDTH].tolist()]
    wanted = list(range(records[0].end - WIDTH, records[0].end))
    assert [max(token, -1) for token in found] == [max(token, -1) for token in wanted]


def test_records_of_a_prompt() -> None:
    """Text before items, items from cut to cut, and whole blocks of the last text."""
    assert records_of(100, [(5, 40, True), (47, 3, False)], 0.1, 16) == [
        Record(0, 5), Record(5, 9), Record(9, 45), Record(45, 47), Record(47, 50), Record(50, 98),
    ]  # fmt: skip
    assert records_of(50, [(0, 40, True)], 0.0, 16) == [Record(0, 40)]


def test_cuts() -> None:
    assert cuts_of(40, 0.1) == (0, 4, 40)
    assert cuts_of(40, 0.0) == (0, 40)
    assert cuts_of(40, 1.0) == (0, 40)
    assert chosen_cut((0, 4, 40), [4, 4]) == 4
    assert chosen_cut((0, 4, 40), [6, 1]) == 0
    assert chosen_cut((0, 4, 40), [40, 40]) == 40


def plan(policy: str, *, strict: bool = False, prefix: int = 0, outputs: int = 59) -> Plan:
    spans = [Span(0, 10, 40, "a", True, cuts=(0, 4, 40))]
    return build_plan(
        num_tokens=60, spans=spans, num_layers=3, policy=get_policy(policy), budget=0.1, strict=strict,
        output_rows=torch.tensor([outputs]), prefix=prefix, records=[],
    )  # fmt: skip


def test_plan_jumps_from_the_cut_of_the_policy() -> None:
    assert plan("uniform").jumps == (Jump(14, 50, (1,), 0),)
    assert plan("none").jumps == (Jump(10, 50, (0, 1), 0),)
    assert plan("full").jumps == ()
    assert plan("uniform").rows_per_layer[:3] == (24, 24, 24)


def test_plan_jumps_over_a_prefix() -> None:
    assert plan("uniform", prefix=50).jumps == (Jump(0, 50, (0,), 0),)
    assert plan("uniform", prefix=5).jumps == (Jump(0, 5, (0,), 0), Jump(14, 50, (2,), 1))


def test_plan_computes_items_that_results_need() -> None:
    assert plan("uniform", outputs=30).jumps == ()


def test_scattered_rows() -> None:
    found = plan("random")
    assert found.rows_per_layer[:3] == (24, 24, 24)
    assert "the first rows only" in found.explanations[0]
    with pytest.raises(PlanError, match="the first rows only"):
        plan("random", strict=True)


def test_a_single_row_is_refused() -> None:
    """Every layer needs two rows, and a row inside a jump has no state before it."""
    with pytest.raises(PlanError, match="two computed tokens"):
        plan("none", prefix=59)
