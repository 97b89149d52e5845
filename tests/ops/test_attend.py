"""``vlcache.attend`` against its definition in float64 and against models' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ops import attend_reference, decompose_attend

attend = torch.ops.vlcache.attend


def operands(
    heads: int, key_heads: int, rows: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def one(count: int, length: int) -> Tensor:
        return (torch.randn(1, count, length, 16, generator=generator) * 2).to(dtype)

    return one(heads, rows), one(key_heads, tokens), one(key_heads, tokens)


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return attention by definition, in float64; a row's weights and its sink's weight add up to 1."""
    group = query.shape[1] // key.shape[1]
    key, value = (one.double().repeat_interleave(group, 1) for one in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * 0.2
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    total = total if sinks is None else total + sinks.double()[None, :, None, None].exp()
    return (weights / total).nan_to_num(0.0) @ value


@given(
    groups=st.sampled_from([1, 2, 3]), key_heads=st.integers(1, 2), rows=st.integers(1, 20),
    tokens=st.integers(1, 40), softcap=st.sampled_from([None, 0.5, 20.0]), has_sinks=st.booleans(),
    kind=st.sampled_from(["none", "bool", "added", "row", "causal"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=80)
def test_attend_equals_definition(
    groups: int, key_heads: int, rows: int, tokens: int, softcap: float | None, has_sinks: bool, kind: str,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    query, key, value = operands(groups * key_heads, key_heads, rows, tokens, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.randn(groups * key_heads, generator=generator) if has_sinks else None
    shown = torch.rand(1, 1, rows, tokens, generator=generator) < 0.5
    masks: dict[str, Tensor | None] = {
        "bool": shown,
        "added": torch.where(shown, torch.randn(rows, tokens, generator=generator), -torch.inf).to(dtype),
        "row": shown[..., :1, :],
    }
    causal = torch.ones(rows, tokens, dtype=torch.bool).tril()
    got = attend(query, key, value, masks.get(kind), sinks, kind == "causal", 0.2, softcap, groups > 1)
    want = exact(query, key, value, causal if kind == "causal" else masks.get(kind), sinks, softcap)
    assert got.dtype == dtype
    # Scores are rounded to bfloat16, as in models with explicit attention code.
    tolerance = 1e-5 if dtype == torch.float32 else 8e-2
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_attend_of_masked_row_is_zero() -> None:
    query, key, value = operands(2, 2, 3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    for sinks in (None, torch.zeros(2)):
        result = attend(query, key, value, mask, sinks, False, 0.2, 3.0, False)
        assert not result[:, :, 1].any()
        assert result[:, :, [0, 2]].all()


def test_attend_with_sink() -> None:
    """With equal scores, a sink of log(number of keys) gets half of the weight."""
    _, key, value = operands(1, 1, 1, 8)
    query, sinks = torch.zeros(1, 1, 1, 16), torch.full((1,), 8.0).log()
    result = attend(query, key, value, None, sinks, False, 1.0, None, False)
    torch.testing.assert_close(result, value.mean(2, keepdim=True) / 2)


def test_attend_with_values_of_another_dtype() -> None:
    """Scores in float32 and values in bfloat16, as in models that upcast their scores."""
    query, key, value = operands(2, 1, 4, 6)
    result = attend(query, key, value.bfloat16(), None, None, True, 0.2, None, True)
    assert result.dtype == torch.bfloat16
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(result.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("has_all", [False, True])
def test_attend_opcheck(has_all: bool) -> None:
    mask, sinks, cap = (torch.ones(4, 6, dtype=torch.bool), torch.zeros(4), 3.0) if has_all else (None,) * 3
    arguments = (*operands(4, 2, 4, 6), mask, sinks, not has_all, 0.2, cap, True)
    torch.library.opcheck(attend.default, arguments, test_utils=("test_schema", "test_faketensor"))


def decomposed(*arguments: Any) -> tuple[list[str], Tensor]:
    tensors = [one for one in arguments if isinstance(one, Tensor)]

    def call(*given: Tensor) -> Tensor:
        waiting = iter(given)
        result: Tensor = attend(*[next(waiting) if isinstance(one, Tensor) else one for one in arguments])
        return result

    table = {attend.default: decompose_attend}
    module = make_fx(call, decomposition_table=table, pre_dispatch=True)(*tensors)
    return [str(node.target) for node in module.graph.nodes], module(*tensors)


def test_decompose_attend_to_aten() -> None:
    arguments = (*operands(4, 2, 4, 6), None, torch.zeros(4), True, 0.2, 3.0, True)
    targets, result = decomposed(*arguments)
    assert not [target for target in targets if "vlcache" in target]
    assert torch.equal(result, attend_reference(*arguments))


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs a CPU with AVX-512 BF16")
def test_decompose_attend_to_bfloat16_kernel() -> None:
    arguments = (*operands(4, 2, 4, 6, dtype=torch.bfloat16), None, None, True, 0.2, None, True)
    targets, result = decomposed(*arguments)
    assert "vlcache.attention.default" in targets
    torch.testing.assert_close(result, attend_reference(*arguments), atol=2e-2, rtol=2e-2)
