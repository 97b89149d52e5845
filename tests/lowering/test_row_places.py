"""Attention is told the places of its rows where its mask is made of them, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from vlcache_fx.lowering.row_places import attend_up_to, read_places

aten = torch.ops.aten
ROWS, TOKENS, WIDTH = 5, 40, 16


def attend(mask: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask(rows, key), **options)

    return run


def one_sample(rows: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[2]) <= rows.unsqueeze(1)


def samples(rows: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[2]) <= rows.unsqueeze(-1).unsqueeze(1)


def operands(dtype: torch.dtype, batched: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    batch = 2 if batched else 1
    query, key, value = (
        torch.randn(batch, heads, count, WIDTH, generator=generator).to(dtype)
        for heads, count in ((4, ROWS), (2, TOKENS), (2, TOKENS))
    )
    rows = torch.stack([torch.tensor([0, 3, 17, 38, 39]) - shift for shift in range(batch)])
    return query, key, value, rows if batched else rows[0]


def traced(run: Callable[..., Tensor], args: tuple[Tensor, ...]) -> GraphModule:
    found: GraphModule = make_fx(run, tracing_mode="symbolic", pre_dispatch=True)(*args)
    return found


def targets(module: GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_rows_are_not_made(dtype: torch.dtype, batched: bool) -> None:
    args = operands(dtype, batched)
    module = traced(attend(samples if batched else one_sample, enable_gqa=True, scale=0.3), args)
    want = module(*args)
    assert aten.le.Tensor in targets(module)
    assert read_places(module.graph)
    module.recompile()
    left = targets(module)
    assert attend_up_to in left
    assert not {aten.le.Tensor, aten.arange.default, aten.scaled_dot_product_attention.default} & set(left)
    torch.testing.assert_close(module(*args), want, atol=2e-2 if dtype == torch.bfloat16 else 0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_and_tokens_runs_on_what_was_traced(dtype: torch.dtype) -> None:
    query, key, value, rows = operands(dtype, False)
    module = traced(attend(one_sample, enable_gqa=True), (query, key, value, rows))
    read_places(module.graph)
    module.recompile()
    again = traced(module, (query, key, value, rows))
    assert attend_up_to not in targets(again)
    fewer = (query[:, :, :3], key[:, :, :29], value[:, :, :29], torch.tensor([1, 9, 28]))
    want = attend(one_sample, enable_gqa=True)(*fewer)
    torch.testing.assert_close(again(*fewer), want, atol=2e-2 if dtype == torch.bfloat16 else 0, rtol=0)


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "earlier tokens alone": lambda rows, key: torch.arange(key.shape[2]) < rows.unsqueeze(1),
    "a window": lambda rows, key: (
        one_sample(rows, key) & (torch.arange(key.shape[2]) > rows.unsqueeze(1) - 9)
    ),
    "every second token": lambda rows, key: torch.arange(0, 2 * key.shape[2], 2) <= rows.unsqueeze(1),
    "numbers": lambda rows, key: one_sample(rows, key).to(key.dtype),
    "heads": lambda rows, key: torch.arange(key.shape[2]) <= rows[:4].unsqueeze(1).unsqueeze(1).unsqueeze(0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name: str) -> None:
    args = operands(torch.float32, False)
    module = traced(attend(OTHERS[name], enable_gqa=True), args)
    before = str(module.graph)
    assert not read_places(module.graph)
    assert str(module.graph) == before


def test_a_mask_of_one_column_holds_for_all_tokens() -> None:
    """It is broadcast: rows at 0 or behind read everything."""
    query, key, value, rows = operands(torch.float32, False)
    got = attend_up_to(query, key, value, rows - 1, 1, enable_gqa=True)
    allowed = (torch.arange(1) <= (rows - 1)[:, None]).expand(ROWS, TOKENS)
    want = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(
        got[:, :, 1:], F.scaled_dot_product_attention(query, key, value, enable_gqa=True)[:, :, 1:]
    )
