"""``fold_repeated_heads``: attention reads key and value heads unrepeated."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.analysis.attention.sites import ATTEND, SDPA, find_sites
from vlcache_fx.passes.cleanup import FoldRepeatedHeads
from vlcache_fx.passes.cleanup import fold_repeated_heads as module
from vlcache_fx.passes.utility.attention import gqa_needs_math_kernel

from ..programs import before_and_after, unchanged
from .graphs import program_of


def operands(groups: int = 2, key_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (groups * key_heads, key_heads, key_heads)
    query, key, value = (torch.randn(1, count, 5, 8, generator=generator) for count in heads)
    return query, key, value


def expanded(x: Tensor, groups: int = 2) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def interleaved(x: Tensor, groups: int = 2) -> Tensor:
    return x.repeat_interleave(groups, 1)


def attention(repeat: Callable[..., Tensor], groups: int = 2) -> Callable[..., tuple[Tensor]]:
    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        key, value = repeat(key, groups), repeat(value, groups)
        return (F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3),)

    return function


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = program_of(attention(expanded), *operands())
    golden("fold_repeated_heads", before_and_after(FoldRepeatedHeads(), program))


@pytest.mark.parametrize("repeat", [expanded, interleaved])
@given(groups=st.sampled_from([2, 3, 4]), key_heads=st.integers(1, 3))
def test_numbers(repeat: Callable[..., Tensor], groups: int, key_heads: int) -> None:
    inputs = operands(groups, key_heads)
    program = program_of(attention(repeat, groups), *inputs)
    assert FoldRepeatedHeads().run(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    (site,) = find_sites(program.graph)
    assert (site.enable_gqa, site.is_causal, site.scale) == (True, True, 0.3)
    assert site.key.meta["val"].shape[1] == key_heads
    assert not [node for node in program.graph.nodes if "expand" in node.name or "repeat" in node.name]
    assert torch.equal(program.graph_module(*inputs)[0], attention(repeat, groups)(*inputs)[0])


def of_the_operator(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
    key, value = expanded(key), expanded(value)
    arguments = (None, torch.arange(4.0), True, 0.3, 2.0, False)
    return (torch.ops.vlcache.attend(query, key, value, *arguments),)


def test_folds_vlcache_attend() -> None:
    program = program_of(of_the_operator, *operands())
    assert FoldRepeatedHeads().run(program)
    program.graph_module.recompile()
    (site,) = find_sites(program.graph)
    assert (site.enable_gqa, site.softcap, site.is_causal) == (True, 2.0, True)
    got, want = program.graph_module(*operands())[0], of_the_operator(*operands())[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_keeps_repeated_heads_where_gqa_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    mask = object()
    assert gqa_needs_math_kernel(SDPA, on_cuda, mask)
    assert not gqa_needs_math_kernel(SDPA, on_cuda, None)
    assert not gqa_needs_math_kernel(SDPA, on_cpu, mask)
    assert not gqa_needs_math_kernel(ATTEND, on_cuda, mask)
    monkeypatch.setattr(module, "gqa_needs_math_kernel", lambda *given: True)
    assert unchanged(FoldRepeatedHeads(), program_of(attention(expanded), *operands()))


def returned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    key, value = expanded(key), expanded(value)
    return F.scaled_dot_product_attention(query, key, value), key


def in_another_order(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Query head h reads key head h modulo the number of key heads."""
    key, value = (one[:, None].expand(1, 2, 2, 5, 8).reshape(1, 4, 5, 8) for one in (key, value))
    return (F.scaled_dot_product_attention(query, key, value),)


def keys_alone(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    value = torch.cat([value, value + 1], 1)
    return (F.scaled_dot_product_attention(query, expanded(key), value),)


def not_repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (F.scaled_dot_product_attention(query, key, value, enable_gqa=True),)


@pytest.mark.parametrize("function", [returned, in_another_order, keys_alone, not_repeated])
def test_keeps_other_operands(function: Callable[..., tuple[Tensor, ...]]) -> None:
    assert unchanged(FoldRepeatedHeads(), program_of(function, *operands()))


def test_keeps_dropout() -> None:
    def dropped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(query, expanded(key), expanded(value), dropout_p=1.0),)

    program = program_of(dropped, *operands())
    assert FoldRepeatedHeads().run(program)
    program.graph_module.recompile()
    assert not program.graph_module(*operands())[0].nan_to_num().any()
