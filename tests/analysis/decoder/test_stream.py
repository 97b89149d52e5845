"""The residual stream and its layers, by structure alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.analysis import analyze
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.graphs import captured_graph

from ...models import LAYERS, WIRINGS, wired
from ..graphs import CALL, attend, capture, captured_vlm

X = torch.randn(1, 6, 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dynamic": True},
        {"norm_place": "post", "dynamic": True},
        {"norm": "layer", "bias": True},
        {"parallel": True},
        {"norm_place": "branch"},
        {"norm_place": "post"},
        {"last_only": False, "explicit_mask": True},
        {"fused_qkv": True, "qk_norm": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_find_stream_isomorphic_layers(options: dict[str, Any]) -> None:
    stream = analyze(captured_vlm(num_layers=3, **options)).stream
    assert len(stream.boundaries) == 4
    assert str(stream.boundaries[0].target) == "aten.masked_scatter.default"
    targets = [Counter(str(node.target) for node in members) for members in stream.members]
    assert targets[0] == targets[1] == targets[2]
    for boundary, members in zip(stream.boundaries[1:], stream.members, strict=True):
        assert members[-1] is boundary
        assert boundary.meta["val"].shape == stream.boundaries[0].meta["val"].shape
    parts = [node for members in stream.members for node in members]
    assert len(parts) == len(set(parts))
    assert set(stream.nodes) == {stream.boundaries[0], *parts, *stream.tail}


@pytest.mark.parametrize("options", [{}, {"parallel": True}, {"norm_place": "branch"}], ids=str)
def test_find_stream_single_layer(options: dict[str, object]) -> None:
    stream = analyze(captured_vlm(num_layers=1, **options)).stream
    assert str(stream.boundaries[1].target) == "aten.add.Tensor"
    assert [str(node.target) for node in stream.tail] == [
        "aten.slice.Tensor", "aten.rms_norm.default", "aten.linear.default",
    ]  # fmt: skip


def refused(function: object, **call: Tensor) -> UnsupportedGraphError:
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(function, call))  # type: ignore[arg-type]
    return refusal.value


def test_check_results_refuses_hidden_states() -> None:
    def all_hidden_states(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        first = x + attend(x)
        return first, first + attend(first)

    refusal = refused(all_hidden_states, x=X)
    assert refusal.reason is Reason.TOKEN_AXIS_LOST
    assert "the graph returns it" in refusal.detail


@pytest.mark.parametrize("kind", WIRINGS)
def test_find_stream_with_paths_around_layers(kind: str) -> None:
    """A layer ends at a node on every path from its attention, even with paths around the layer."""
    stream = analyze(captured_graph(wired(kind), CALL)[0]).stream
    assert str(stream.boundaries[0].target) == "aten.masked_scatter.default"
    assert [str(boundary.target) for boundary in stream.boundaries[1:]] == ["aten.add.Tensor"] * LAYERS
    parts = [node for members in stream.members for node in members]
    assert len(parts) == len(set(parts))
    assert set(stream.nodes) == {stream.boundaries[0], *parts, *stream.tail}


def test_find_stream_side_path_in_first_layer() -> None:
    stream = analyze(captured_graph(wired("side"), CALL)[0]).stream
    (side,) = [node for node in stream.nodes if node.target is torch.ops.aten.tanh.default]
    assert side in stream.members[0]


def test_find_stream_refuses_two_tensors() -> None:
    """Queries of the first, keys and values of the second: neither is the residual."""

    def pair(x: Tensor) -> Tensor:
        x = x * 2
        attention = nn.functional.scaled_dot_product_attention
        heads = x[:, None]
        first = attention(heads, heads, heads, is_causal=True)
        return x + attention(first * 2, first.exp(), first.exp(), is_causal=True)[:, 0]

    refusal = refused(pair, x=X)
    assert refusal.reason is Reason.NO_STREAM
    assert "no single residual tensor enters" in refusal.detail


def test_find_stream_refuses_unused_attention() -> None:
    def unused(x: Tensor) -> Tensor:
        x = x * 2
        attend(x)
        return x

    assert refused(unused, x=X).reason is Reason.NO_STREAM


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_stream_several_samples(dynamic: bool | None) -> None:
    def batched(x: Tensor) -> Tensor:
        x = x * 2
        return x + attend(x)

    facts = analyze(capture(batched, {"x": torch.randn(2, 6, 4)}, dynamic))
    assert len(facts.stream.boundaries) == 2
    assert facts.batch_dims is not None
