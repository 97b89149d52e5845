"""The residual stream and its layers, by structure alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.analysis import analyze
from vlcache_fx.errors import Reason, UnsupportedGraphError

from .graphs import attend, capture, captured_vlm

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
def test_layers_are_isomorphic(options: dict[str, Any]) -> None:
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
def test_a_single_layer_ends_at_its_last_sum(options: dict[str, object]) -> None:
    stream = analyze(captured_vlm(num_layers=1, **options)).stream
    assert str(stream.boundaries[1].target) == "aten.add.Tensor"
    assert [str(node.target) for node in stream.tail] == [
        "aten.slice.Tensor", "aten.rms_norm.default", "aten.linear.default",
    ]  # fmt: skip


def refused(function: object, **call: Tensor) -> UnsupportedGraphError:
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(function, call))  # type: ignore[arg-type]
    return refusal.value


def test_hidden_states_of_inner_layers_are_refused() -> None:
    def all_hidden_states(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        first = x + attend(x)
        return first, first + attend(first)

    refusal = refused(all_hidden_states, x=X)
    assert refusal.reason is Reason.TOKEN_AXIS_LOST
    assert "the graph returns it" in refusal.detail


def test_a_side_path_around_a_layer_is_refused() -> None:
    def skipping(x: Tensor) -> Tensor:
        x = x * 2
        return x + attend(attend(x) * 2)

    assert refused(skipping, x=X).reason is Reason.NO_STREAM


def test_more_than_one_sample_is_refused() -> None:
    def batched(x: Tensor) -> Tensor:
        x = x * 2
        return x + attend(x)

    refusal = refused(batched, x=torch.randn(2, 6, 4))
    assert refusal.reason is Reason.BATCHED
    assert "(2, 6, 4)" in refusal.detail
