"""Classes of tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.explaining.tokens import (
    TokenClass,
    TokenRange,
    by_column,
    classify,
    count,
    ranges_of_kinds,
    unmodified,
)
from vlcache_fx.runtime.observation import SampleObservation

from .examples import COUNTS, SAMPLE


def test_classify_all_classes() -> None:
    ranges = classify(SAMPLE)
    assert [(str(run.kind), run.start, run.end) for run in ranges] == [
        ("prefix", 0, 2),
        ("text", 2, 4),
        ("recomputed", 4, 5),
        ("partly", 5, 6),
        ("reused", 6, 10),
        ("text", 10, 12),
        ("computed", 12, 16),
        ("text", 16, 18),
        ("padding", 18, 20),
    ]
    assert {kind.value: number for kind, number in count(ranges).items()} == COUNTS


def test_prefix_hides_images_in_it() -> None:
    sample = SampleObservation(10, 8, ((2, 6),), ((2, 6),), (((8, 10),), ((9, 10),)))
    assert [run.kind for run in classify(sample)] == [TokenClass.PREFIX, TokenClass.TEXT]


def test_cold_call_has_no_reused_tokens() -> None:
    sample = SampleObservation(10, 0, ((2, 6),), (), (((0, 10),), ((9, 10),)))
    assert count(classify(sample)) == {TokenClass.TEXT: 6, TokenClass.COMPUTED: 4}


def test_unmodified() -> None:
    assert unmodified(0) == ()
    assert count(unmodified(7)) == {TokenClass.UNMODIFIED: 7}


@given(st.lists(st.sampled_from(list(TokenClass)), max_size=60), st.integers(1, 20))
def test_runs_cover_all_tokens(kinds: list[TokenClass], columns: int) -> None:
    ranges = ranges_of_kinds(kinds)
    assert [run.kind for run in ranges for _ in range(run.length)] == kinds
    assert all(first.end == then.start and first.kind is not then.kind for first, then in pairwise(ranges))
    if kinds:
        drawn = by_column(ranges, min(columns, len(kinds)))
        assert (drawn[0].start, drawn[-1].end) == (0, min(columns, len(kinds)))
        assert {run.kind for run in drawn} <= set(kinds)


def test_recomputed_tokens_stay_visible() -> None:
    ranges = (
        TokenRange(TokenClass.REUSED, 0, 5000),
        TokenRange(TokenClass.RECOMPUTED, 5000, 5001),
        TokenRange(TokenClass.REUSED, 5001, 8000),
    )
    drawn = by_column(ranges, 80)
    assert [run.length for run in drawn if run.kind is TokenClass.RECOMPUTED] == [1]
    assert drawn[-1].end == 80


@pytest.mark.parametrize("kind", list(TokenClass))
def test_labels(kind: TokenClass) -> None:
    assert kind.label
    assert TokenClass(kind.value) is kind
