"""``vlcache.causal_conv1d``: a convolution over a token and earlier ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from vlcache_fx.ops import causal_conv1d
from vlcache_fx.ops.causal_conv1d import causal_conv1d_reference

conv = torch.ops.vlcache.causal_conv1d


def operands(
    tokens: int, width: int, past: int | None = None, batch: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return values of tokens, weight, bias and, unless ``past`` is None, values of earlier tokens."""
    generator = torch.Generator().manual_seed(0)

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    before = None if past is None else made(batch, 3, past)
    return made(batch, 3, tokens), made(3, 1, width), made(3), before


@given(
    tokens=st.integers(1, 7),
    width=st.integers(1, 5),
    past=st.one_of(st.none(), st.integers(0, 6)),
    batch=st.integers(1, 2),
    has_bias=st.booleans(),
)
@settings(max_examples=25)
def test_equals_definition(tokens: int, width: int, past: int | None, batch: int, has_bias: bool) -> None:
    x, weight, bias, before = operands(tokens, width, past, batch)
    seen = torch.cat([x.new_zeros(batch, 3, width), x if before is None else torch.cat([before, x], -1)], -1)
    end = seen.shape[-1] - tokens
    want = torch.stack(
        [
            (seen[..., end + token + 1 - width : end + token + 1] * weight[:, 0]).sum(-1)
            for token in range(tokens)
        ],
        -1,
    )
    want = want + bias[:, None] if has_bias else want
    given_bias = bias if has_bias else None
    torch.testing.assert_close(conv(x, weight, given_bias, before), want)
    torch.testing.assert_close(causal_conv1d_reference(x, weight, given_bias, before), want)


def test_equals_padded_conv1d() -> None:
    """As models write it, bitwise."""
    x, weight, bias, _ = operands(9, 4, dtype=torch.float32)
    want = F.conv1d(x, weight, bias, padding=3, groups=3)[..., :9]
    assert torch.equal(conv(x, weight, bias), want)


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_continues_from_earlier_tokens(cut: int) -> None:
    """The last ``width - 1`` values are all that matters of them."""
    x, weight, bias, _ = operands(9, 4)
    whole = conv(x, weight, bias)
    torch.testing.assert_close(conv(x[..., cut:], weight, bias, x[..., :cut]), whole[..., cut:])
    kept = x[..., max(cut - 3, 0) : cut]
    torch.testing.assert_close(conv(x[..., cut:], weight, bias, kept), whole[..., cut:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past", [None, 2])
def test_opcheck(dtype: torch.dtype, past: int | None) -> None:
    x, weight, bias, before = operands(5, 4, past, batch=2, dtype=dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(conv.default, (x, weight, bias, before), test_utils=checks)
    torch.library.opcheck(conv.default, (x.transpose(0, 2).contiguous().transpose(0, 2), weight),
                          test_utils=checks)  # fmt: skip
    assert conv(x, weight, bias, before).dtype is dtype


def test_of_strided_values() -> None:
    """Models transpose tokens and channels; the result is contiguous."""
    x, weight, bias, _ = operands(9, 4)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    got = conv(strided, weight, bias)
    assert got.is_contiguous()
    torch.testing.assert_close(got, conv(x, weight, bias))


def test_compiles_once_for_all_lengths() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(causal_conv1d, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (5, 9, 30):
        x, weight, bias, before = operands(tokens, 4, 3)
        assert torch.equal(compiled(x, weight, bias, before), conv(x, weight, bias, before))
    assert counter.frame_count == 1
