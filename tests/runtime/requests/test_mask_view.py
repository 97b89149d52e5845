"""Masks in words: equal for equal rules in whatever form, different for different rules."""

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
        (padded(CAUSAL.triu(-10), 3), "causal"),  # all that it hides is padding
        (CAUSAL.triu(-14), "causal"),  # the window is wider than what lies before the item
    ],
)
def test_forms_of_one_rule_are_one_text(mask: Tensor, text: str) -> None:
    assert view(mask).of_item(SPAN) == text


@pytest.mark.parametrize("mask", [CAUSAL.triu(-3), CAUSAL.triu(-10), CAUSAL], ids=["narrow", "wide", "none"])
def test_an_item_that_moves_keeps_its_text(mask: Tensor) -> None:
    assert view(mask).of_item(SPAN) == view(mask, MOVED).of_item(MOVED)


def test_other_rules_are_other_texts() -> None:
    masks = [CAUSAL, both_ways(SPAN), CAUSAL.triu(-3), CAUSAL.triu(-4), CAUSAL.triu(-10), CAUSAL.triu(-9)]
    masks += [padded(CAUSAL, 11), chunked(4), chunked(12), CAUSAL & ~CAUSAL.tril(-5).triu(-5)]
    assert len({view(mask).of_item(SPAN) for mask in masks}) == len(masks)


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL.triu(-14), CAUSAL.triu(-10), chunked(12)])
def test_a_rule_with_a_parameter_counts_whether_values_show_it_or_not(mask: Tensor) -> None:
    text = view(mask, MOVED, "window of 14").of_item(MOVED)
    assert text == "causal, window of 14"
    assert view(CAUSAL, MOVED).of_item(MOVED) == "causal"


def test_what_is_added_counts() -> None:
    slope = (torch.arange(TOKENS)[None] - torch.arange(TOKENS)[:, None]) * 0.5
    one, other = (additive(CAUSAL) + scale * slope for scale in (1, 2))
    texts = {view(mask, rule="bias").of_item(SPAN) for mask in (one, other, additive(CAUSAL))}
    assert len(texts) == 3
    assert view(one, MOVED, "bias").of_item(MOVED) == view(one, SPAN, "bias").of_item(SPAN)


def test_keys_in_another_order_say_the_same() -> None:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    shuffled = view_of(CAUSAL.triu(-10)[:, order], order, TOKENS, [SPAN])
    assert shuffled.of_item(SPAN) == view(CAUSAL.triu(-10)).of_item(SPAN)
    assert shuffled.of_tokens(TOKENS) == view(CAUSAL.triu(-10)).of_tokens(TOKENS)


def test_rows_of_a_longer_prompt_begin_alike() -> None:
    longer = torch.ones(40, 40, dtype=torch.bool).tril().triu(-10)
    rows = view_of(longer, torch.arange(40), 40, [SPAN]).of_tokens(40)
    assert rows[:TOKENS] == view(CAUSAL.triu(-10)).of_tokens(TOKENS)
    wider = view(CAUSAL.triu(-9)).of_tokens(TOKENS)
    assert wider[:10] == rows[:10]  # where the window does not end yet
    assert wider[10] != rows[10]
