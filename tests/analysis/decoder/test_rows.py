"""Rows of each node of a layer, and values that later layers read besides the residual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.decoder.rows import Carried
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.graphs import captured_graph

from ...models import WIRINGS, wired
from ..graphs import CALL, attend, capture

X = torch.randn(1, 6, 4)


def carried(kind: str, dynamic: bool | None = None) -> list[tuple[str, int, int]]:
    facts = analyze(captured_graph(wired(kind), CALL, dynamic=dynamic)[0])
    for one in facts.carried:
        assert isinstance(one, Carried)
        assert one.operand in one.reader.all_input_nodes
        assert one.dim == 1
    return [(str(one.operand.target), one.made_at, one.read_at) for one in facts.carried]


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_carried_side_path(dynamic: bool | None) -> None:
    """It is computed in the first layer, for rows that the second layer needs (level 1)."""
    assert carried("side", dynamic) == [("aten.tanh.default", 1, 2), ("aten.tanh.default", 1, 3)]


def test_find_carried_layer_result() -> None:
    assert carried("skip") == [("aten.add.Tensor", 1, 3)]


@pytest.mark.parametrize("kind", ["plain", "shared", "shared values", "residual values"])
def test_find_carried_without_full_keys(kind: str) -> None:
    """They have all tokens: a splice completes them."""
    assert carried(kind) == []


@pytest.mark.parametrize("kind", WIRINGS)
def test_follow_rows_every_layer(kind: str) -> None:
    facts = analyze(captured_graph(wired(kind), CALL)[0])
    assert facts.num_layers == 3
    for layer, boundary in zip(facts.layers, facts.stream.boundaries[1:], strict=True):
        assert {*layer.kv_part, *layer.q_part} <= set(facts.flows)
        assert facts.flows[boundary].dim == 1


def refused(function: object, **parts: torch.nn.Module) -> UnsupportedGraphError:
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(function, {"x": X}, **parts))  # type: ignore[arg-type]
    return refusal.value


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("tail", "it reads masked_scatter of an inner layer"),
        ("mixed keys", "keys or values mix with slice_.* of another layer"),
    ],
)
def test_find_carried_refuses_rows_among_all_tokens(kind: str, detail: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=detail) as refusal:
        analyze(captured_graph(wired(kind), CALL)[0])
    assert refusal.value.reason is Reason.TOKEN_AXIS_LOST
    assert "models.py" in str(refusal.value.source_line)


def test_find_carried_refuses_repeated_tokens() -> None:
    """Token i has the indices i and i + n."""

    def repeated(x: Tensor) -> Tensor:
        x = x * 2
        twice = x[0].repeat(2, 1)
        for _ in range(3):
            x = x + attend(x)
            x = x + (x[0].repeat(2, 1) * twice).view(2, 6, 4).sum(0, keepdim=True)
        return x

    refusal = refused(repeated)
    assert refusal.reason is Reason.TOKEN_AXIS_LOST
    assert "repeat comes from another layer" in refusal.detail


def test_check_results_refuses_inner_rows() -> None:
    def inner(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        x = x + attend(x)
        between = x.exp()
        return between, x + attend(x)

    refusal = refused(inner)
    assert refusal.reason is Reason.TOKEN_AXIS_LOST
    assert refusal.node == "exp"
    assert "the graph returns it" in refusal.detail


def test_follow_rows_refuses_other_query_axis() -> None:
    def turned(x: Tensor) -> Tensor:
        x = x * 2
        y = torch.nn.functional.scaled_dot_product_attention(
            x.transpose(1, 2), x.exp().transpose(1, 2), x.exp().transpose(1, 2), is_causal=True
        )
        return x + y.transpose(1, 2)

    refusal = refused(turned)
    assert refusal.reason is Reason.TOKEN_AXIS_LOST
    assert "token dimension is not -2" in refusal.detail
