"""The bfloat16 CPU attention kernel against attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.ops import attention as module
from vlcache_fx.ops.attention import FastAttention, attention, decompose_attention, row_mask
from vlcache_fx.options import Options

from .helpers import kernel_calls, needs_kernel


def operands(
    batch: int, group: int, key_heads: int, rows: int, tokens: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value with models' strides: token-major, transposed to [batch, heads, ...]."""
    generator = torch.Generator().manual_seed(seed)

    def one(count: int, heads: int) -> Tensor:
        values = torch.randn(batch, count, heads, dim, generator=generator)
        return values.bfloat16().transpose(1, 2)

    return one(rows, group * key_heads), one(tokens, key_heads), one(tokens, key_heads)


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return attention by definition, in float64; zero for a row that reads no token."""
    group = query.shape[1] // key.shape[1]
    key, value = (one.double().repeat_interleave(group, 1) for one in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    if causal:
        allowed = allowed & torch.ones_like(allowed).tril()
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights @ value


@needs_kernel
@given(
    batch=st.integers(1, 2), group=st.sampled_from([1, 3, 8]), key_heads=st.integers(1, 2),
    rows=st.integers(1, 150), tokens=st.integers(1, 600), dim=st.sampled_from([16, 48, 64, 128]),
    kind=st.sampled_from(["none", "causal", "rows", "rows and heads", "samples", "vector"]),
    seed=st.integers(0, 9),
)  # fmt: skip
@example(batch=1, group=2, key_heads=1, rows=256, tokens=256, dim=64, kind="causal", seed=0)
@example(batch=2, group=1, key_heads=2, rows=129, tokens=257, dim=32, kind="samples", seed=1)
@example(batch=2, group=8, key_heads=2, rows=2, tokens=515, dim=48, kind="rows and heads", seed=2)
@example(batch=1, group=3, key_heads=1, rows=5, tokens=259, dim=128, kind="causal", seed=3)
@example(batch=1, group=1, key_heads=2, rows=16, tokens=1, dim=16, kind="none", seed=4)
@settings(max_examples=60)
def test_attention_equals_definition(
    batch: int, group: int, key_heads: int, rows: int, tokens: int, dim: int, kind: str, seed: int
) -> None:
    query, key, value = operands(batch, group, key_heads, rows, tokens, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "rows": (1, 1, rows, tokens),
        "rows and heads": (1, group * key_heads, rows, tokens),
        "samples": (batch, 1, 1, tokens),
        "vector": (tokens,),
    }
    mask = torch.rand(sizes[kind], generator=generator) < 0.3 if kind in sizes else None
    causal = kind == "causal"
    got = attention(query, key, value, mask, causal, 0.2)
    want = exact(query, key, value, mask, causal, 0.2)
    # The error of rounding weights, sums and results to bfloat16.
    torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=2e-2)


@needs_kernel
@given(
    batch=st.integers(1, 2), of_samples=st.booleans(), masked=st.booleans(), group=st.sampled_from([1, 8]),
    rows=st.integers(1, 150), tokens=st.integers(1, 600), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40)
def test_attention_with_places(
    batch: int, of_samples: bool, masked: bool, group: int, rows: int, tokens: int, seed: int
) -> None:
    query, key, value = operands(batch, group, 2, rows, tokens, 32, seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, 1, rows, 1) if of_samples else (rows, 1)
    places = torch.randint(
        -1, tokens + 3, sizes, generator=generator
    )  # also before the first and after the last token
    mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    allowed = row_mask(places, tokens)
    assert torch.equal(allowed, torch.arange(tokens) <= places)
    want = exact(query, key, value, allowed if mask is None else allowed & mask, False, 0.2)
    got = attention(query, key, value, mask, False, 0.2, places)
    torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=2e-2)


@needs_kernel
@pytest.mark.parametrize("rows", [2, 100])
def test_attention_reads_no_keys_past_the_end(rows: int) -> None:
    query, key, value = operands(1, 4, 2, rows, 259, 48)
    longer = [torch.cat([one, torch.full_like(one[:, :, :9], float("nan"))], 2) for one in (key, value)]
    got = attention(query, *(one[:, :, :259] for one in longer), None, False, 0.2)
    assert torch.equal(got, attention(query, key, value, None, False, 0.2))


@needs_kernel
@pytest.mark.parametrize("rows", [2, 100])
def test_attention_is_as_accurate_as_pytorch(rows: int) -> None:
    query, key, value = operands(1, 4, 2, rows, 3000, 64)
    allowed = torch.arange(3000 - rows, 3000)[:, None] >= torch.arange(3000)
    want = exact(query, key, value, allowed, False, 0.125)
    ours = attention(query, key, value, allowed, False, 0.125)
    theirs = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    assert (ours - want).abs().max() <= 1.5 * (theirs - want).abs().max()


@needs_kernel
def test_attention_of_masked_rows_and_large_scores() -> None:
    query, key, value = operands(1, 1, 2, 5, 300, 16)
    mask = torch.zeros(5, 300, dtype=torch.bool)
    mask[1, 299] = True
    result = attention(query * 1e4, key * 1e4, value, mask, False, 1.0)
    assert torch.equal(result[:, :, 1], value[:, :, 299])
    assert not result[:, :, [0, 2, 3, 4]].any()


@needs_kernel
def test_attention_of_any_layout() -> None:
    query, key, value = operands(2, 2, 2, 9, 40, 32)
    mask = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    want = attention(query, key, value, mask, False, 0.25)
    offset = torch.zeros(key.numel() + 1, dtype=torch.bfloat16)[1:].view(key.shape).copy_(key)
    scattered = value.transpose(2, 3).contiguous().transpose(2, 3)
    got = attention(query.contiguous(), offset, scattered, mask.t().contiguous().t(), False, 0.25)
    assert torch.equal(got, want)


@needs_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_attention_opcheck(masked: bool) -> None:
    query, key, value = operands(1, 2, 2, 4, 6, 16)
    mask = torch.ones(4, 6, dtype=torch.bool) if masked else None
    places = torch.arange(4)[:, None] if masked else None
    torch.library.opcheck(
        torch.ops.vlcache.attention.default,
        (query, key, value, mask, not masked, 0.25, places),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_attention_without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernel", lambda: None)
    query, key, value = operands(1, 2, 2, 4, 6, 16)
    result = attention(query, key, value, None, True, 0.25)
    assert torch.equal(result, F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    ))  # fmt: skip
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(one) for one in (query, key, value)), None, True, 0.25)
    assert fake.stride() == result.stride()
    places = torch.tensor([3, 0, 5, 1])[:, None]
    got = attention(query, key, value, None, False, 0.25, places)
    assert torch.equal(got, attention(query, key, value, row_mask(places, 6), False, 0.25))
    assert decompose_attention(query, key, value) is NotImplemented


@needs_kernel
def test_attention_with_onednn_disabled_after_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands(1, 2, 2, 4, 6, 16)
    want = attention(query, key, value, None, True, 0.25)
    monkeypatch.setattr(module, "_mkldnn_enabled", lambda: False)
    torch.testing.assert_close(attention(query, key, value, None, True, 0.25), want)
    assert decompose_attention(query, key, value) is NotImplemented


@needs_kernel
@pytest.mark.parametrize(
    ("change", "kwargs"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), {}),
        (lambda q, k, v: (q[0], k[0], v[0]), {}),
        (lambda q, k, v: (q, k[:, :1], v[:, :1]), {}),
        (lambda q, k, v: (q, k, v[..., :8]), {}),
        (lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8]), {}),
        (lambda q, k, v: (q.clone().requires_grad_(), k, v), {}),
        (lambda q, k, v: (q, k, v), {"dropout_p": 0.1}),
        (lambda q, k, v: (q, k, v), {"attn_mask": torch.zeros(4, 6, dtype=torch.bfloat16)}),
        (lambda q, k, v: (q, k, v), {"places": torch.zeros(4, 1, dtype=torch.int32)}),
        (lambda q, k, v: (q, k, v), {"places": torch.zeros(4, 6, dtype=torch.int64)}),
        (lambda q, k, v: (q, k, v), {"places": torch.zeros(1, 2, 4, 1, dtype=torch.int64)}),
    ],
    ids=[
        "float32", "no batch", "groups not asked for", "wide keys", "narrow", "gradient", "dropout", "bias",
        "short places", "places of tokens", "places of heads",
    ],
)  # fmt: skip
def test_decompose_attention_rejects_other_calls(change: Any, kwargs: dict[str, Any]) -> None:
    query, key, value = operands(1, 1, 2, 4, 6, 16)
    assert decompose_attention(query, key, value) is not NotImplemented
    assert decompose_attention(*change(query, key, value), **kwargs) is NotImplemented


@needs_kernel
def test_fast_attention_mode() -> None:
    query, key, value = operands(1, 1, 2, 8, 8, 16)
    with FastAttention():
        fast = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        plain = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
        assert torch.equal(torch.add(query, 1), query + 1)
    assert torch.equal(fast, attention(query, key, value, None, True, 0.25))
    assert torch.equal(
        plain, F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    )


class Attending(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True) * 2,)


@needs_kernel
@pytest.mark.parametrize(("lowering", "calls"), [("inductor", 2), ("eager", 0)])
def test_attention_in_lowered_programs(lowering: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel_calls(module, monkeypatch)
    run = None
    for rows in (5, 9):
        query, key, value = operands(1, 2, 2, rows, 20, 16)
        mask = torch.ones(rows, 20, dtype=torch.bool).tril(20 - rows)
        if run is None:
            traced = make_fx(Attending(), tracing_mode="symbolic", pre_dispatch=True)(query, key, value, mask)
            run = Engine(Options(lowering=lowering)).lowering.lower(traced, name="attending")
        want = 2 * exact(query, key, value, mask, False, 0.25)
        torch.testing.assert_close(run((query, key, value, mask))[0].double(), want, atol=4e-2, rtol=2e-2)
    assert len(seen) == calls
