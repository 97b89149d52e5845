"""``fuse_attention``: products and a softmax become one attention call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.cleanup import FoldRepeatedHeads, FuseAttention
from vlcache_fx.testing.graphs import captured_graph

from ..programs import before_and_after, unchanged
from .graphs import program_of
from .written import DIM, HEADS, ROWS, Written, one_result, operands

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""In bfloat16, separate operators round the scores, and the weights before the sum."""


def fused(function: Callable[..., Any], *inputs: Tensor) -> tuple[list[Site], Any]:
    """Return the attention calls after the pass, and the result of the graph."""
    program = program_of(function, *inputs)
    Pipeline((FuseAttention(), FoldRepeatedHeads())).run(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return list(find_sites(program.graph)), program.graph_module(*inputs)


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = program_of(one_result(Written(key_heads=HEADS)), *operands(HEADS))
    golden("fuse_attention", before_and_after(FuseAttention(), program))


def test_graph_with_cap_and_sinks(golden: Callable[[str, str], None]) -> None:
    form = Written(softcap=2.0, sinks="last, shifted", mask="added", key_heads=HEADS)
    program = program_of(one_result(form), *operands(HEADS))
    golden("fuse_attention_cap_and_sinks", before_and_after(FuseAttention(), program))


@pytest.mark.parametrize(
    "mask", ["none", "added", "two added", "filled", "filled lowest", "where", "where hidden"]
)
@pytest.mark.parametrize(
    "product", ["matmul", "grouped", "shared key", "bmm", "baddbmm", "einsum", "grouped einsum"]
)
def test_numbers(product: Any, mask: Any) -> None:
    form = Written(product, mask=mask, key_heads=1 if product == "shared key" else 2)
    inputs = operands(form.key_heads)
    (site,), (got,) = fused(one_result(form), *inputs)
    assert (site.softcap, site.sinks) == (None, None)
    assert site.scale == pytest.approx(1 / 3)
    if product not in ("bmm", "baddbmm", "einsum"):  # there, layout operators are between repeat and product
        assert site.enable_gqa
        assert site.key.meta["val"].shape == (1, form.key_heads, ROWS, DIM)
    torch.testing.assert_close(got, form(*inputs), atol=1e-5, rtol=1e-5)


@given(
    form=st.builds(
        Written,
        product=st.sampled_from(["matmul", "einsum"]),
        scale=st.sampled_from(["scores", "divided", "query", "key", "both"]),
        mask=st.sampled_from(["none", "added", "two added", "filled", "filled lowest", "where"]),
        softcap=st.sampled_from([None, 0.5, 4.0]),
        sinks=st.sampled_from(["none", "last", "first", "last, shifted"]),
        key_heads=st.sampled_from([1, 2, 4]),
        wide=st.booleans(),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
@settings(max_examples=120)
def test_every_form_becomes_one_call(form: Written, dtype: torch.dtype, seed: int) -> None:
    inputs = operands(form.key_heads, dtype, seed)
    (site,), (got,) = fused(one_result(form), *inputs)
    assert site.softcap == form.softcap
    assert (site.sinks is None) == (form.sinks == "none")
    assert (site.mask is None) == (form.mask == "none")
    if form.product == "matmul":  # in an einsum, layout operators are between
        assert site.scale == pytest.approx(1 / 3)
        assert site.enable_gqa == (form.key_heads < HEADS)
        assert site.key.meta["val"].shape[1] == form.key_heads
    want = form(*inputs)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("mask", ["added", "filled lowest", "where"])
def test_fully_masked_row_attends_uniformly(mask: Any) -> None:
    form = Written(mask=mask)
    query, key, value, shown, sinks = operands()
    shown[3] = False
    _, (got,) = fused(one_result(form), query, key, value, shown, sinks)
    torch.testing.assert_close(got, form(query, key, value, shown, sinks), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, ::2, 3], value.mean(2), atol=1e-5, rtol=1e-5)


def test_layers_share_mask() -> None:
    form = Written(mask="where")

    def two(query: Tensor, *rest: Tensor) -> tuple[Tensor]:
        return (form(form(query, *rest), *rest),)

    (first, second), _ = fused(two, *operands())
    assert first.mask is second.mask


def test_constant_tensor_as_fill_value() -> None:
    """Under Dynamo, ``torch.tensor(-1e9)`` is a constant of the graph."""

    class Hiding(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores = torch.where(mask, x @ x.transpose(-1, -2), torch.tensor(-1e9))
            return scores.softmax(-1) @ x

    call = {"x": operands()[0], "mask": operands()[3]}
    captured, graph = captured_graph(Hiding(), call)
    (site,) = find_sites(captured.graph_module.graph)
    assert site.mask is not None
    with torch.no_grad():
        got = captured.graph_module(*graph.calls[0])[0]
    torch.testing.assert_close(got, Hiding()(**call), atol=1e-5, rtol=1e-5)


def test_views_of_result_become_reshapes() -> None:
    """The result of a product is contiguous, that of a call may not be."""

    def viewed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        return ((weights @ value).view(HEADS * ROWS, DIM),)

    heads_last = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in operands(HEADS)[:3]]
    (_,), (got,) = fused(viewed, *heads_last)
    torch.testing.assert_close(got, viewed(*heads_last)[0], atol=1e-5, rtol=1e-5)


# Unchanged graphs -------------------------------------------------------------------------------------------


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-1, -2) / math.sqrt(DIM)


def returns_weights(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    weights = scores(query, key).softmax(-1)
    return weights @ value, weights


def reads_scores(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    logits = scores(query, key)
    return (logits.softmax(-1) @ value * logits.logsumexp(-1, keepdim=True),)


def over_queries(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (scores(query, key).softmax(-2) @ value,)


def drops_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (torch.dropout(scores(query, key).softmax(-1), 0.5, True) @ value,)


def temperature(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return ((scores(query, key) * value[:, :, :1, :1]).softmax(-1) @ value,)


def weights_times(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return ((scores(query, key).softmax(-1) * 0.5) @ value,)


def clamped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (scores(query, key).relu().softmax(-1) @ value,)


def filled_with_a_value(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    hidden = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)
    return (scores(query, key).masked_fill(hidden, -3.0).softmax(-1) @ value,)


def sink_of_each_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    logits = torch.cat([scores(query, key), query[..., :1]], -1)
    return (logits.softmax(-1)[..., :-1] @ value,)


def no_product(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (query[..., :ROWS].softmax(-1) @ value,)


LEFT_ALONE = [
    returns_weights, reads_scores, over_queries, drops_out, temperature, weights_times, clamped,
    filled_with_a_value, sink_of_each_row, no_product,
]  # fmt: skip


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_keeps_other_forms(function: Callable[..., tuple[Tensor, ...]]) -> None:
    program = program_of(function, *operands(HEADS)[:3])
    assert unchanged(FuseAttention(), program)
    assert find_sites(program.graph) == ()
