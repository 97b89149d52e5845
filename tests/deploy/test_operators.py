"""Portable operators against the operators that they replace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.deploy.operators import (
    ATTENTION_OPSET,
    attention,
    attention_node,
    merge,
    plain_operators,
)
from vlcache_fx.testing.prompts import noise

WIDTH = 3


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 2))
def test_merge_equals_masked_scatter(flags: list[bool], spare: int) -> None:
    embeddings = noise(0, 1, len(flags), WIDTH)
    features = noise(1, max(1, sum(flags) + spare), WIDTH)
    mask = torch.tensor(flags)[None, :, None]
    expected = embeddings.masked_scatter(mask.expand_as(embeddings), features)
    assert torch.equal(merge(embeddings, mask, features), expected)
    assert torch.equal(merge(embeddings, mask.expand_as(embeddings), features), expected)


def test_merge_several_items_in_order() -> None:
    embeddings, features = noise(0, 1, 6, WIDTH), noise(1, 2, 2, WIDTH)
    mask = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)[None, :, None]
    merged = merge(embeddings, mask, features)
    assert torch.equal(merged[0, [0, 1, 3, 4]], features.reshape(4, WIDTH))
    assert torch.equal(merged[0, [2, 5]], embeddings[0, [2, 5]])


def heads(count: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return noise(seed, 1, count, tokens, 8).to(dtype)


def masks(rows: int, tokens: int) -> dict[str, Tensor | None]:
    seen = torch.arange(tokens) <= torch.arange(rows).unsqueeze(1) + tokens - rows
    return {
        "none": None,
        "bool": seen[None, None],
        "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None],
        "bias": noise(3, 1, 4, rows, tokens),
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "bias"])
@pytest.mark.parametrize("rows", [5, 7])
def test_attention_equals_torch(kind: str, kv_heads: int, rows: int) -> None:
    query, key, value = heads(4, rows), heads(kv_heads, 7, seed=1), heads(kv_heads, 7, seed=2)
    mask = masks(rows, 7)[kind]
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(attention(query, key, value, mask, enable_gqa=True), expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_causal_equals_torch(kv_heads: int, scale: float | None) -> None:
    query, key, value = heads(4, 6), heads(kv_heads, 6, seed=1), heads(kv_heads, 6, seed=2)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(
        attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True), expected
    )


def test_attention_keeps_value_width_and_dtype() -> None:
    query, key = heads(2, 4, torch.float16), heads(2, 4, torch.float16, 1)
    value = noise(2, 1, 2, 4, 3).half()
    found = attention(query, key, value, masks(4, 4)["bool"])
    assert (found.shape, found.dtype) == ((1, 2, 4, 3), torch.float16)
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), masks(4, 4)["bool"])
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)


def test_attention_causal_keeps_the_device() -> None:
    query = heads(2, 4).to("meta")
    assert attention(query, query, query, is_causal=True).device.type == "meta"


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_attention_node_equals_attention(kind: str) -> None:
    query, key, value = heads(4, 5), heads(2, 7, seed=1), heads(2, 7, seed=2)
    mask = masks(5, 7)[kind]
    torch.testing.assert_close(
        attention_node(query, key, value, mask, enable_gqa=True),
        attention(query, key, value, mask, enable_gqa=True),
    )


def test_plain_operators_attention_by_opset() -> None:
    site = torch.ops.aten.scaled_dot_product_attention.default
    assert plain_operators(ATTENTION_OPSET - 1)[site] is attention
    assert plain_operators(ATTENTION_OPSET)[site] is attention_node


def test_plain_operators_replace_all_vlcache_operators() -> None:
    ours = {target for target in plain_operators(22) if target.namespace == "vlcache"}
    named = ("attend", "splice_rows", "scatter_rows", "take_rows")
    assert ours == {getattr(torch.ops.vlcache, name).default for name in named}
