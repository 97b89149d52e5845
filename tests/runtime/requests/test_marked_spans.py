"""Spans that callers mark, and those whose rows are found in the embeddings."""

from __future__ import annotations

import torch

from vlcache_fx.runtime.requests.marked_spans import found_spans


def test_found_spans_in_order() -> None:
    """Equal items one after the other; an item that is not there; features of another width."""
    embeds = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    first, second = embeds[0, 3:9].clone(), embeds[1, 20:25].clone()
    embeds[0, 12:18] = first
    given = [first, first, torch.randn(5, 4), second, torch.randn(5, 3), torch.empty(0, 4)]
    assert found_spans(embeds, given) == ((0, 3, 6), (0, 12, 6), (1, 20, 5))


def test_found_spans_are_whole() -> None:
    """The first row alone makes no span, and none reaches beyond the tokens."""
    embeds = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    rows = embeds[0, 4:8].clone()
    rows[3] += 1
    assert found_spans(embeds, [rows]) == ()
    assert found_spans(embeds, [torch.cat([embeds[0, 6:], embeds[0, :2]])]) == ()
