"""Texts of masks: equal for equal rules in any representation, different for different rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.mask_view import MaskView, view_of

TOKENS = 24
SPAN = Span(0, 8, 6, "image", False)
MOVED = Span(0, 12, 6, "image", False)
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def both_ways(span: Span) -> Tensor:
    mask = CAUSAL.clone()
    mask[span.start : span.end, span.start : span.end] = True
    return mask


def padded(mask: Tensor, count: int = 3) -> Tensor:
    mask = mask.clone()
    mask[:, :count] = False
    return mask


def chunked(size: int) -> Tensor:
    chunk = torch.arange(TOKENS) // size
    return CAUSAL & (chunk[:, None] == chunk)


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]


def view(mask: Tensor, span: Span = SPAN, rule: str = "") -> MaskView:
    return view_of(mask, torch.arange(TOKENS), TOKENS, [span], rule)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (CAUSAL, "causal"),
        (additive(CAUSAL), "causal"),
        (CAUSAL.expand(1, 2, TOKENS, TOKENS), "causal"),
        (padded(CAUSAL), "causal"),
        (both_ways(SPAN), "both ways"),
        (padded(both_ways(SPAN)), "both ways"),
        (CAUSAL.triu(-10), "causal, window 10"),
        (additive(CAUSAL.triu(-10)), "causal, window 10"),
        (padded(CAUSAL.triu(-10), 1), "causal, window 10"),
        (padded(CAUSAL.triu(-10), 3), "causal"),  # hides padding only
        (CAUSAL.triu(-14), "causal"),  # wider than the text before the span
    ],
)
def test_shown_to_span(mask: Tensor, text: str) -> None:
    assert view(mask).shown_to_span(SPAN) == text


@pytest.mark.parametrize("mask", [CAUSAL.triu(-3), CAUSAL.triu(-10), CAUSAL], ids=["narrow", "wide", "none"])
def test_shown_to_span_after_move(mask: Tensor) -> None:
    assert view(mask).shown_to_span(SPAN) == view(mask, MOVED).shown_to_span(MOVED)


def test_shown_to_span_of_different_rules() -> None:
    masks = [CAUSAL, both_ways(SPAN), CAUSAL.triu(-3), CAUSAL.triu(-4), CAUSAL.triu(-10), CAUSAL.triu(-9)]
    masks += [padded(CAUSAL, 11), chunked(4), chunked(12), CAUSAL & ~CAUSAL.tril(-5).triu(-5)]
    assert len({view(mask).shown_to_span(SPAN) for mask in masks}) == len(masks)


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL.triu(-14), CAUSAL.triu(-10), chunked(12)])
def test_shown_to_span_with_rule_parameter(mask: Tensor) -> None:
    text = view(mask, MOVED, "window of 14").shown_to_span(MOVED)
    assert text == "causal, window of 14"
    assert view(CAUSAL, MOVED).shown_to_span(MOVED) == "causal"


def test_shown_to_span_with_bias() -> None:
    slope = (torch.arange(TOKENS)[None] - torch.arange(TOKENS)[:, None]) * 0.5
    one, other = (additive(CAUSAL) + scale * slope for scale in (1, 2))
    texts = {view(mask, rule="bias").shown_to_span(SPAN) for mask in (one, other, additive(CAUSAL))}
    assert len(texts) == 3
    assert view(one, MOVED, "bias").shown_to_span(MOVED) == view(one, SPAN, "bias").shown_to_span(SPAN)


def test_view_of_keys_in_other_order() -> None:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    shuffled = view_of(CAUSAL.triu(-10)[:, order], order, TOKENS, [SPAN])
    assert shuffled.shown_to_span(SPAN) == view(CAUSAL.triu(-10)).shown_to_span(SPAN)
    assert shuffled.shown_to_tokens(TOKENS) == view(CAUSAL.triu(-10)).shown_to_tokens(TOKENS)


def test_shown_to_tokens_of_longer_prompt() -> None:
    longer = torch.ones(40, 40, dtype=torch.bool).tril().triu(-10)
    rows = view_of(longer, torch.arange(40), 40, [SPAN]).shown_to_tokens(40)
    assert rows[:TOKENS] == view(CAUSAL.triu(-10)).shown_to_tokens(TOKENS)
    wider = view(CAUSAL.triu(-9)).shown_to_tokens(TOKENS)
    assert wider[:10] == rows[:10]  # where the window does not end yet
    assert wider[10] != rows[10]
