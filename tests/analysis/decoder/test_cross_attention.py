"""Cross-attended keys and values that depend on an item alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from vlcache_fx.analysis.decoder.cross_attention import find_cross_attended
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.subgraph import needed_for

from ..graphs import attend, capture, captured_vlm

CALL = {
    "ids": torch.tensor([[1, 2, 3, 4, 5, 6, 0]]),
    "pixels": torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)),
    "kept": torch.tensor([[True, True, True, False, True]]),
}


def parts() -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 4) for name in ("encoder", "key", "value")} | {"embed": nn.Embedding(9, 4)}


def decoder(
    ids: Tensor, pixels: Tensor, kept: Tensor, encoder: Any, key: Any, value: Any, embed: Any
) -> Tensor:
    """Self-attention, then attention to an image with padding rows."""
    image = attend(encoder(pixels), is_causal=False)
    x = embed(ids)
    x = x + attend(x)
    mask = kept[:, None, None].expand(1, 1, x.shape[1], 5)
    y = F.scaled_dot_product_attention(x[:, None], key(image)[:, None], value(image)[:, None], attn_mask=mask)
    return x + y[:, 0]


def cross_attending(dynamic: bool | None = None) -> Captured:
    return capture(decoder, CALL, dynamic, **parts())


def inputs_of(captured: Captured, nodes: tuple[Node, ...], kind: InputKind) -> list[Any]:
    """Values of the inputs of one kind that ``nodes`` depend on, sizes included."""
    needed = needed_for(nodes)
    kinds = zip(captured.placeholders, captured.kinds, strict=True)
    return [node.meta["val"] for node, own in kinds if own is kind and node in needed]


def dtypes_of(captured: Captured, nodes: tuple[Node, ...]) -> set[torch.dtype]:
    return {value.dtype for value in inputs_of(captured, nodes, InputKind.DATA)}


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_cross_attended(dynamic: bool | None) -> None:
    captured = cross_attending(dynamic)
    attended = find_cross_attended(captured)
    targets = [str(node.target) for node in attended]
    assert targets.count("aten.linear.default") == 3
    assert targets.count("aten.scaled_dot_product_attention.default") == 1  # of the image
    assert "aten.embedding.default" not in targets
    assert dtypes_of(captured, attended) == {torch.float32}


def test_find_cross_attended_without_text_length() -> None:
    """A mask of the image's rows depends on the item alone, until it is repeated for every token."""

    def masked(
        ids: Tensor, pixels: Tensor, kept: Tensor, encoder: Any, key: Any, value: Any, embed: Any
    ) -> Tensor:
        image = torch.where(kept[..., None], encoder(pixels), 0)
        x = embed(ids)
        x = x + attend(x)
        bias = image.sum(-1)[:, None, None]
        y = F.scaled_dot_product_attention(
            x[:, None], key(image)[:, None], value(image)[:, None], attn_mask=bias.expand(1, 1, x.shape[1], 5)
        )
        return x + y[:, 0]

    captured = capture(masked, CALL, dynamic=True, **parts())
    attended = find_cross_attended(captured)
    expanded = [node for node in captured.graph_module.graph.nodes if "expand" in str(node.target)]
    assert expanded
    assert not set(expanded) & set(attended)
    assert "aten.sum.dim_IntList" in [str(node.target) for node in attended]
    assert dtypes_of(captured, attended) == {torch.bool, torch.float32}
    everything = (captured.graph_module.graph.output_node(),)
    ids = next(one for one in inputs_of(captured, everything, InputKind.DATA) if one.dtype == torch.int64)
    sizes = [str(size) for size in inputs_of(captured, everything, InputKind.SIZE)]
    assert str(ids.shape[1]) in sizes
    assert str(ids.shape[1]) not in map(str, inputs_of(captured, attended, InputKind.SIZE))


def past(ids: Tensor, known: Tensor, key: Any, embed: Any) -> Tensor:
    """A step with past keys."""
    x = embed(ids)
    keys = torch.cat([known, key(x)], 1)[:, None]
    return x + F.scaled_dot_product_attention(x[:, None], keys, keys)[:, 0]


def of_positions(ids: Tensor, table: Tensor, embed: Any) -> Tensor:
    """Attention to rows that integers index: these are no item."""
    x, rows = embed(ids), embed(table)
    return x + F.scaled_dot_product_attention(x[:, None], rows[:, None], rows[:, None])[:, 0]


def bidirectional(pixels: Tensor, encoder: Any) -> Tensor:
    return attend(encoder(pixels), is_causal=False)


def queries_of_the_encoder(pixels: Tensor, learned: Tensor, encoder: Any) -> Tensor:
    """Learned queries: the query depends on no data."""
    rows = encoder(pixels)[:, None]
    return F.scaled_dot_product_attention(learned[:, None], rows, rows)


@pytest.mark.parametrize(
    ("function", "call", "modules"),
    [
        (past, {"ids": CALL["ids"][:, :1], "known": torch.randn(1, 5, 4)}, ("key", "embed")),
        (of_positions, {"ids": CALL["ids"], "table": CALL["ids"][:, :5]}, ("embed",)),
        (bidirectional, {"pixels": CALL["pixels"]}, ("encoder",)),
        (queries_of_the_encoder, {"pixels": CALL["pixels"]}, ("encoder",)),
    ],
)
def test_find_cross_attended_other_attention(
    function: Any, call: dict[str, Tensor], modules: tuple[str, ...]
) -> None:
    held: dict[str, Any] = {name: module for name, module in parts().items() if name in modules}
    if function is queries_of_the_encoder:
        held["learned"] = torch.randn(1, 3, 4)
    assert find_cross_attended(capture(function, call, **held)) == ()


@pytest.mark.parametrize("options", [{}, {"explicit_mask": True}, {"dynamic": True}], ids=str)
def test_find_cross_attended_plain_decoder(options: dict[str, Any]) -> None:
    assert find_cross_attended(captured_vlm(**options)) == ()


def test_queries_scaled_by_position_are_no_cross_attention() -> None:
    """Keys hold no positions, and an earlier call's keys come first: the text attends to itself."""

    def scaled(ids: Tensor, positions: Tensor, past: Tensor, key: Any, embed: Any) -> Tensor:
        x = embed(ids)
        keys = torch.cat([past, key(x)], 1)[:, None]
        query = (x * positions[..., None].float().log1p())[:, None]
        return x + F.scaled_dot_product_attention(query, keys, keys)[:, 0]

    call = {"ids": CALL["ids"], "positions": torch.arange(5, 12)[None], "past": torch.randn(1, 5, 4)}
    own = {name: part for name, part in parts().items() if name in ("key", "embed")}
    assert find_cross_attended(capture(scaled, call, **own)) == ()
