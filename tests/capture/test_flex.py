"""Flex attention is captured without the blocks of its mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.testing.graphs import traced_graphs

from ..runtime.helpers import own_compiler_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated.*:DeprecationWarning"),
]

X, PADDING = torch.randn(1, 2, 20, 16), torch.ones(1, 20, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Flex(nn.Module):
    """Builds its blocks in ``forward``; the mask reads an input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & padding[b, k]

        blocks = create_block_mask(mask, 1, None, x.shape[2], x.shape[2], device=x.device)
        return flex_attention(x @ self.weight, x, x, block_mask=blocks)


def captures(model: nn.Module, call: dict[str, Any], dynamic: bool | None = None) -> list[Captured]:
    found: list[Captured] = []
    traced_graphs(model, call, dynamic=dynamic, seen=lambda *given: found.append(capture_dynamo(*given)))
    return found


def targets(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dynamic", [None, True])
def test_drop_block_masks_keeps_call(dynamic: bool | None) -> None:
    (captured,) = captures(Flex(), {"x": X, "padding": PADDING}, dynamic)
    found = targets(captured)
    assert found.count("flex_attention") == 1
    assert set(found) == {"flex_attention", "aten.matmul.default", "<built-in function getitem>"}
    assert all(type(buffer) is Tensor for buffer in captured.graph_module.buffers())


def test_drop_block_masks_keeps_dynamo_graph() -> None:
    (graph,) = traced_graphs(Flex(), {"x": X, "padding": PADDING})
    before = str(graph.graph_module.graph)
    capture_dynamo(graph.graph_module, graph.example_inputs)
    assert str(graph.graph_module.graph) == before


def test_drop_block_masks_returned_blocks() -> None:
    """They are traced below the levels of ``vmap``, writes included."""

    def made(x: Tensor) -> BlockMask:
        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= k

        return create_block_mask(causal, 1, None, 20, 20, device=x.device, BLOCK_SIZE=4)

    class Returning(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            blocks = made(x)
            return flex_attention(x, x, x, block_mask=blocks), blocks.kv_indices

    (captured,) = captures(Returning(), {"x": X})
    results: Any = captured.graph_module.graph.output_node().args[0]
    (got,) = extract(captured.graph_module, [results[1]])(X)
    assert got.shape[-1] == 5
    assert torch.equal(got, made(X).kv_indices)


class Mapped(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.vmap(lambda row: row * row.sum())(x)


@pytest.mark.parametrize("dynamic", [None, True])
def test_capture_inlines_other_vmap(dynamic: bool | None) -> None:
    """Many models compute masks of other attention in this way."""
    (captured,) = captures(Mapped(), {"x": X}, dynamic)
    sizes = [n.meta["val"] for n in captured.placeholders if not isinstance(n.meta["val"], Tensor)]
    (result,) = captured.graph_module(*(int(size) for size in sizes), X)
    assert torch.equal(result, X * X.sum((1, 2, 3), keepdim=True))


def test_refuse_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-dispatch tracing cannot resolve them, and would return wrong results."""
    (graph,) = traced_graphs(Mapped(), {"x": X})
    monkeypatch.setattr("vlcache_fx.capture.dynamo.inline_vmap", lambda module: False)
    with pytest.raises(UnsupportedGraphError, match=r"transforms of torch\.func") as refusal:
        capture_dynamo(graph.graph_module, graph.example_inputs)
    assert refusal.value.reason is Reason.CAPTURE_FAILED


def test_drop_block_masks_keeps_other_writes() -> None:
    """Only writes to tensors of the blocks are removed with the blocks."""

    class Writing(Flex):
        def forward(self, x: Tensor, padding: Tensor) -> Any:
            kept = x.new_zeros(2, 3)
            kept[padding[0, :2].long(), 0] = 1.0
            return super().forward(x, padding), kept

    (captured,) = captures(Writing(), {"x": X, "padding": PADDING})
    assert "aten.index_put.default" in targets(captured)


def test_capture_refuses_integer_graphs() -> None:
    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(x.shape[0]) <= x[:, None]

    (graph,) = traced_graphs(Mask(), {"x": torch.arange(4)})
    with pytest.raises(UnsupportedGraphError, match="no floating-point tensor") as refusal:
        capture_dynamo(graph.graph_module, graph.example_inputs)
    assert refusal.value.reason is Reason.NO_ATTENTION
