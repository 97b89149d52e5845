"""The heat map of tokens x layers."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.explaining.heat_map import blocks, shares, svg
from vlcache_fx.runtime.observation import ranges_of


@given(st.sets(st.integers(0, 49)), st.integers(1, 50))
def test_shares_equal_counting(tokens: set[int], columns: int) -> None:
    edges = [column * 50 // columns for column in range(columns + 1)]
    expected = [
        sum(token in tokens for token in range(first, last)) / (last - first)
        for first, last in pairwise(edges)
    ]
    ranges = ranges_of(torch.tensor(sorted(tokens), dtype=torch.int64))
    assert shares([ranges], 50, columns, 4) == [pytest.approx(expected)]


def test_ranges_join_neighbours() -> None:
    assert ranges_of(torch.tensor([0, 1, 2, 5, 7, 8])) == ((0, 3), (5, 6), (7, 9))
    assert ranges_of(torch.tensor([3, 3, 4])) == ((3, 5),)  # plans may repeat a row to have two
    assert ranges_of(torch.tensor([], dtype=torch.int64)) == ()


def test_layers_share_rows_by_their_mean() -> None:
    all_tokens, none = ((0, 4),), ()
    assert shares([all_tokens, none, all_tokens, all_tokens], 4, 2, 2) == [[0.5, 0.5], [1.0, 1.0]]


def test_heat_map_of_a_long_prompt_is_small_and_quick() -> None:
    """8,000 tokens and 60 layers, with scattered rows that differ in each layer."""
    torch.manual_seed(0)
    rows = [ranges_of(torch.randperm(8000)[: 2000 - 30 * layer].sort().values) for layer in range(60)]
    began_s = time.perf_counter()
    drawn = svg(rows, 8000)
    assert time.perf_counter() - began_s < 5
    assert len(drawn) < 300_000
    assert set(re.findall(r"shade-(\d)", drawn)) <= set("12345678")


def test_cell_sizes_of_paths() -> None:
    drawn = svg([((0, 2),), ((1, 2),)], 4)
    assert 'viewBox="0 0 4 2"' in drawn
    assert '<path class="shade-8" d="M0 0h2v1h-2zM1 1h1v1h-1z"/>' in drawn


def test_blocks() -> None:
    assert blocks([((0, 2),), ()], 4) == ["██··", "····"]
    assert blocks([((0, 1),)], 8, columns=2) == ["░·"]
