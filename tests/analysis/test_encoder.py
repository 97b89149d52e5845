"""Encoder graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.analysis.encoder import is_encoder

from .graphs import attend, capture, captured_vlm

PIXELS = {"pixels": torch.randn(1, 6, 4)}


def tower(pixels: Tensor, project: nn.Module) -> Tensor:
    x = project(pixels)
    return x + attend(x, is_causal=False)


@pytest.mark.parametrize("dynamic", [None, True])
def test_is_encoder_bidirectional(dynamic: bool | None) -> None:
    assert is_encoder(capture(tower, PIXELS, dynamic, project=nn.Linear(4, 4)))


def test_is_encoder_other_graphs() -> None:
    assert not is_encoder(captured_vlm())  # causal
    assert not is_encoder(captured_vlm(explicit_mask=True))
    assert not is_encoder(capture(lambda pixels: pixels * 2, PIXELS))  # no attention


def test_is_encoder_mixed_attention() -> None:
    def mixed(pixels: Tensor, project: nn.Module) -> Tensor:
        x = tower(pixels, project)
        return x + attend(x)

    assert not is_encoder(capture(mixed, PIXELS, project=nn.Linear(4, 4)))


def test_is_encoder_past_keys() -> None:
    def step(query: Tensor, past: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, past, past)

    assert not is_encoder(capture(step, {"query": torch.ones(1, 2, 1, 4), "past": torch.ones(1, 2, 7, 4)}))


def test_is_encoder_of_token_ids() -> None:
    def of_ids(ids: Tensor, embed: nn.Module) -> Tensor:
        return attend(embed(ids), is_causal=False)

    assert not is_encoder(capture(of_ids, {"ids": torch.tensor([[1, 2, 3]])}, embed=nn.Embedding(5, 4)))
