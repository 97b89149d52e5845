from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.bidirectional import (
    Range,
    bidirectional_ranges,
    last_attended,
    with_whole_media,
)
from vlcache_fx.runtime.requests.media_spans import MediaSpan

TOKENS = 12


def spans_at(*bounds: tuple[int, int]) -> list[Span]:
    return [Span(0, start, end - start, "", False) for start, end in bounds]


def reaching(**last: int) -> Tensor:
    """Tokens that attend to no later token, but for those given as ``t3=7``."""
    reach = torch.arange(TOKENS)
    for name, value in last.items():
        reach[int(name[1:])] = value
    return reach


@pytest.mark.parametrize(
    ("reach", "bounds", "expected"),
    [
        (reaching(), [(2, 5)], []),
        (reaching(t2=4), [(2, 5)], []),  # within its span
        (reaching(t3=7), [(2, 5)], [(2, 8)]),
        (reaching(t3=7, t7=9), [(2, 5)], [(2, 10)]),  # what it attends to attends further
        (reaching(t3=7, t0=2), [(2, 5)], [(0, 8)]),  # text before attends into it
        (reaching(t0=1), [(2, 5)], []),  # of text alone
        (reaching(t3=5), [(2, 5), (6, 8)], [(2, 6)]),
        (reaching(t3=6), [(2, 5), (6, 8)], [(2, 8)]),  # into another span
        (reaching(t3=5, t7=9), [(2, 5), (6, 8)], [(2, 6), (6, 10)]),
        (reaching(t7=9, t3=7), [(2, 5), (6, 8)], [(2, 10)]),
        (reaching(t3=11), [(2, 5), (6, 8)], [(2, 12)]),
    ],
)
def test_ranges(reach: Tensor, bounds: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert bidirectional_ranges(reach, spans_at(*bounds)) == tuple(Range(*own) for own in expected)


@given(
    seen=st.lists(st.tuples(st.integers(0, TOKENS - 1), st.integers(0, TOKENS - 1)), max_size=8),
    cuts=st.lists(st.integers(0, TOKENS), min_size=4, max_size=4, unique=True),
)
def test_ranges_are_closed_and_least(seen: list[tuple[int, int]], cuts: list[int]) -> None:
    first, second, third, fourth = sorted(cuts)
    spans = spans_at((first, second), (third, fourth))
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for row, column in seen:
        mask[row, column] = True
    reach = last_attended(mask)
    ranges = bidirectional_ranges(reach, spans)

    def is_closed(start: int, end: int) -> bool:
        whole = all(
            span.end <= start or end <= span.start or Range(start, end).covers(span) for span in spans
        )
        return whole and not mask[:start, start:].any() and not mask[start:end, end:].any()

    for span in spans:
        leaks = bool(mask[span.start : span.end, span.end :].any())
        covering = [own for own in ranges if own.covers(span)]
        assert len(covering) <= 1
        assert covering or not leaks
    for own in ranges:
        assert is_closed(own.start, own.end)
        inside = [span for span in spans if own.covers(span)]
        smaller = [
            (start, end)
            for start in range(own.start, own.end)
            for end in range(start + 1, own.end + 1)
            if (start, end) != (own.start, own.end) and all(Range(start, end).covers(span) for span in inside)
        ]
        assert len(inside) > 1 or not any(is_closed(*bounds) for bounds in smaller)
    for before, after in pairwise(ranges):
        assert before.end <= after.start


def test_last_attended_joins_heads() -> None:
    mask = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    mask[1, 0, 2] = True
    mask[0, 1] = False  # a padded row attends to nothing
    mask[1, 1] = False
    assert last_attended(mask).tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("ranges", "media", "expected"),
    [
        ([(2, 6)], [], [(2, 6)]),
        ([(2, 6)], [(2, 4), (8, 2)], [(2, 6)]),
        ([(2, 6)], [(0, 3)], [(0, 6)]),
        ([(2, 6)], [(5, 4)], [(2, 9)]),
        ([(2, 6), (7, 9)], [(5, 3)], [(2, 9)]),  # one item lies in both
    ],
)
def test_media_lie_whole_in_a_range(
    ranges: list[tuple[int, int]], media: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    items = [MediaSpan(0, start, length, ()) for start, length in media]
    found = with_whole_media([Range(*own) for own in ranges], items)
    assert found == tuple(Range(*own) for own in expected)
