"""``vlcache.causal_conv1d`` as a sum of products, for compilers."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ops.causal_conv1d import causal_conv1d_reference, decompose_causal_conv1d


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_before", [None, 1, 3, 6])
def test_equals_the_convolution(width: int, has_bias: bool, num_before: int | None) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 6, generator=made).transpose(1, 2)
    weight = torch.randn(6, 1, width, generator=made)
    bias = torch.randn(6, generator=made) if has_bias else None
    before = None if num_before is None else torch.randn(2, 6, num_before, generator=made)
    found = decompose_causal_conv1d(x, weight, bias, before)
    torch.testing.assert_close(found, causal_conv1d_reference(x, weight, bias, before))
    assert found.is_contiguous()


def test_sums_in_float32() -> None:
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 4, 50, generator=made), torch.randn(4, 1, 4, generator=made)
    found = decompose_causal_conv1d(x.bfloat16(), weight.bfloat16())
    exact = causal_conv1d_reference(x.bfloat16().double(), weight.bfloat16().double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-8)


def test_wide_convolutions_stay() -> None:
    assert decompose_causal_conv1d(torch.zeros(1, 2, 30), torch.zeros(2, 1, 16)) is NotImplemented


def test_lengths_are_symbolic() -> None:
    x, weight, before = torch.randn(1, 6, 10), torch.randn(6, 1, 4), torch.randn(1, 6, 4)
    traced = make_fx(decompose_causal_conv1d, tracing_mode="symbolic")(x, weight, None, before)
    longer = torch.randn(1, 6, 23)
    expected = causal_conv1d_reference(longer, weight, None, before)
    torch.testing.assert_close(traced(longer, weight, None, before), expected)
