"""Which masks let a known prefix be exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.mask_check import _looks_ahead

CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()
SPANS = [Span(0, 2, 3, "image", False)]


def with_more(*places: tuple[slice | int, slice | int]) -> Tensor:
    mask = CAUSAL.clone()
    for rows, columns in places:
        mask[rows, columns] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "looks_ahead"),
    [
        (CAUSAL, False),
        (CAUSAL.tril() & CAUSAL.triu(-3), False),  # a window
        (with_more((slice(2, 5), slice(2, 5))), False),  # an image that looks both ways inside itself
        (with_more((slice(2, 5), 5)), True),
        (with_more((0, 1)), True),  # text that looks ahead
        (CAUSAL[:4], True),  # rows that are not the tokens
    ],
    ids=["causal", "window", "image", "image and question", "text", "not square"],
)
@pytest.mark.parametrize("additive", [False, True])
def test_only_images_may_look_ahead(mask: Tensor, looks_ahead: bool, additive: bool) -> None:
    given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
    assert _looks_ahead(given[None, None], torch.arange(8), 8, SPANS) is looks_ahead
    # Behind three keys of earlier calls, which everything sees, and in front of two places for later ones.
    rows = len(given)
    seen, hidden = given[0, 0].expand(rows, 3), given.new_full((rows, 2), False if not additive else -1e30)
    wider = torch.cat([seen, given, hidden], dim=-1)[None, None]
    tokens = torch.tensor([-1] * 3 + list(range(8)) + [-1] * 2)
    assert _looks_ahead(wider, tokens, 8, SPANS) is looks_ahead
