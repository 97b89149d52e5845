"""``use_row_positions``: attention gets positions of rows instead of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from vlcache_fx.ops import attention as kernel
from vlcache_fx.passes import Program
from vlcache_fx.passes.rewrite import UseRowPositions
from vlcache_fx.passes.rewrite.use_row_positions import SDPA, attend_up_to
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ...runtime.helpers import own_compiler_state, with_backend

aten = torch.ops.aten
ROWS, TOKENS, WIDTH = 5, 40, 16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def attend(mask: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask(rows, key), **options)

    return run


def one_sample(rows: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[2]) <= rows.unsqueeze(1)


def samples(rows: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[2]) <= rows.unsqueeze(-1).unsqueeze(1)


def padded(rows: Tensor, key: Tensor) -> Tensor:
    """As in models with an ``attention_mask``; the first three tokens are padding."""
    places = (torch.arange(key.shape[2]) + 0).unsqueeze(0).unsqueeze(1).unsqueeze(2)
    whole = places.new_ones([], dtype=torch.bool)
    allowed = whole & (places <= rows.unsqueeze(0).unsqueeze(1).unsqueeze(3)) & (key[:1, :1, :, 0] > -9)
    return (allowed & (places > 2)).expand(1, -1, -1, key.shape[2])


def window(rows: Tensor, key: Tensor) -> Tensor:
    return one_sample(rows, key) & (torch.arange(key.shape[2]) > rows.unsqueeze(1) - 9)


def operands(dtype: torch.dtype, batched: bool) -> tuple[Tensor, ...]:
    """Return query, key and value of one or two samples, and positions of rows; one row is fully masked."""
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


def targets(module: GraphModule) -> set[Any]:
    return {node.target for node in module.graph.nodes if node.op == "call_function"}


def use_positions(module: GraphModule) -> bool:
    return UseRowPositions().run(Program(module))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-2 if want.dtype == torch.bfloat16 else 0, rtol=0)


@pytest.mark.parametrize("batched", [False, True])
@DTYPES
def test_removes_row_masks(dtype: torch.dtype, batched: bool) -> None:
    args = operands(dtype, batched)
    module = traced(attend(samples if batched else one_sample, enable_gqa=True, scale=0.3), args)
    want = module(*args)
    assert aten.le.Tensor in targets(module)
    assert use_positions(module)
    module.recompile()
    assert attend_up_to in targets(module)
    assert not {aten.le.Tensor, aten.arange.default, SDPA} & targets(module)
    close(module(*args), want)


@DTYPES
def test_traced_graph_accepts_any_sizes(dtype: torch.dtype) -> None:
    query, key, value, rows = operands(dtype, False)
    module = traced(attend(one_sample, enable_gqa=True), (query, key, value, rows))
    use_positions(module)
    module.recompile()
    again = traced(module, (query, key, value, rows))
    assert attend_up_to not in targets(again)
    fewer = (query[:, :, :3], key[:, :, :29], value[:, :, :29], torch.tensor([1, 9, 28]))
    close(again(*fewer), attend(one_sample, enable_gqa=True)(*fewer))


@pytest.mark.parametrize("mask", [padded, window])
@DTYPES
def test_keeps_other_conditions_as_mask(mask: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    args = operands(dtype, False)
    module = traced(attend(mask, enable_gqa=True), args)
    want = module(*args)
    assert use_positions(module)
    module.recompile()
    assert aten.le.Tensor not in targets(module)
    rest = next(iter(module.graph.find_nodes(op="call_function", target=attend_up_to))).args[5]
    assert rest is not None
    close(module(*args), want)
    close(traced(module, args)(*args), want)


def heads(rows: Tensor, key: Tensor) -> Tensor:
    """Positions per head."""
    shifted = rows + torch.arange(4).unsqueeze(1)
    return torch.arange(key.shape[2]) <= shifted.unsqueeze(0).unsqueeze(3)


def tokens(rows: Tensor, key: Tensor) -> Tensor:
    """Not positions of rows: each token is compared with its own number."""
    return torch.arange(key.shape[2]) <= torch.cat([rows] * 8).unsqueeze(0).expand(ROWS, -1)


COMPARED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "short numbers": (one_sample, lambda rows: rows.int()),
    "fractions": (one_sample, lambda rows: rows + 0.5),
    "one place for all rows": (one_sample, lambda rows: rows[2:3]),
    "one sample's places for all": (samples, lambda rows: rows[None]),
    "heads": (heads, lambda rows: rows),
    "tokens": (tokens, lambda rows: rows),
}


@pytest.mark.parametrize("name", COMPARED)
@DTYPES
def test_numbers_for_any_comparison(name: str, dtype: torch.dtype) -> None:
    """Masks of models compare any numbers, of any shape."""
    mask, change = COMPARED[name]
    query, key, value, _ = operands(dtype, True)
    args = (query, key, value, change(operands(dtype, False)[3]))
    module = traced(attend(mask, enable_gqa=True), args)
    want = module(*args)
    assert use_positions(module)
    module.recompile()
    close(module(*args), want)
    close(traced(module, args)(*args), want)


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "earlier tokens alone": lambda rows, key: torch.arange(key.shape[2]) < rows.unsqueeze(1),
    "one or the other": lambda rows, key: one_sample(rows, key) | (key[0, :1, :, 0] > 0),
    "counted down a column": lambda rows, key: (
        torch.arange(key.shape[2]).unsqueeze(1) <= rows.repeat(8)
    ).transpose(0, 1)[:ROWS],
    "every second token": lambda rows, key: torch.arange(0, 2 * key.shape[2], 2) <= rows.unsqueeze(1),
    "numbers": lambda rows, key: one_sample(rows, key).to(key.dtype),
    "counted in fractions": lambda rows, key: (
        torch.arange(key.shape[2], dtype=torch.float64) <= rows.unsqueeze(1)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_keeps_other_masks(name: str) -> None:
    args = operands(torch.float32, False)
    module = traced(attend(OTHERS[name], enable_gqa=True), args)
    before = str(module.graph)
    assert not use_positions(module)
    assert str(module.graph) == before


def test_mask_of_one_column() -> None:
    """It broadcasts: rows at position 0 or later read all tokens."""
    query, key, value, rows = operands(torch.float32, False)
    places = (rows - 1).unsqueeze(1)
    got = attend_up_to(query, key, value, places, 1, None, enable_gqa=True)
    allowed = (torch.arange(1) <= places).expand(ROWS, TOKENS)
    want = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
    everything = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.equal(got[:, :, 1:], everything[:, :, 1:])


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs a processor with AVX-512 BF16")
def test_warm_program_passes_positions_to_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = kernel._kernel(), []
    assert real is not None
    monkeypatch.setattr(kernel, "_kernel", lambda: lambda *args: (seen.append(args), real(*args)))
    with own_compiler_state():
        model = tiny_vlm(hidden=64, heads=4, rope="none").to(torch.bfloat16)
        pair = with_backend(model, policy="first_k", budget=0.2, lowering="inductor")
        for before, mode in ((3, "cold"), (9, "warm")):
            inputs = tiny_vlm_inputs(before, 4, [(20, 0)])
            inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
            seen.clear()
            pair.both(**inputs)
            assert pair.report["mode"] == mode
    # Its arguments: query, key, value, mask, result, sizes, strides, is_causal, positions, scale.
    assert [(one[3] is None, one[8] is None) for one in seen] == [(True, False)] * 2
