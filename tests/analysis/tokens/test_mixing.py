"""Recurrent layers and convolutions that mix tokens outside attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.attention.sites import find_sites
from vlcache_fx.analysis.decoder.merge import find_merges
from vlcache_fx.analysis.tokens.mixing import as_mixing, mixing_refusal
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.ir.refusal import refuse

from ..graphs import attend, capture

CALL = {
    "x": torch.randn(1, 6, 4),
    "features": torch.randn(2, 4),
    "mask": torch.tensor([0, 0, 1, 1, 0, 0]).bool()[None, :, None].expand(1, 6, 4),
}


def convolution(x: Tensor) -> Tensor:
    """A convolution of each token and its neighbours; of earlier ones alone, it could carry its inputs."""
    seen = nn.functional.conv1d(x.transpose(1, 2), torch.ones(4, 1, 3), groups=4, padding=1)
    return seen.transpose(1, 2)


def recurrence(x: Tensor) -> Tensor:
    return x + x.exp().cumsum(1)


def flipped(x: Tensor) -> Tensor:
    return x + x.flip(1)


def graph_of(layer: object, before: bool) -> Captured:
    """Attention twice, with ``layer`` before or between."""

    def decoder(x: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        x = x.masked_scatter(mask, features)
        x = x + layer(x) if before else x + attend(x)  # type: ignore[operator]
        x = x + attend(x) if before else x + layer(x)  # type: ignore[operator]
        return x + attend(x)

    return capture(decoder, CALL)


@pytest.mark.parametrize("before", [True, False], ids=["before", "between"])
@pytest.mark.parametrize(
    ("layer", "node", "detail"),
    [
        (convolution, "conv1d", "it convolves over tokens"),
        (recurrence, "cumsum", "it runs along the token axis"),
    ],
)
def test_mixing_refusal_names_layer(layer: object, node: str, detail: str, before: bool) -> None:
    with pytest.raises(UnsupportedGraphError, match=detail) as refusal:
        analyze(graph_of(layer, before))
    assert (refusal.value.reason, refusal.value.node) == (Reason.TOKEN_MIXING, node)
    assert " mixes tokens outside attention: " in refusal.value.detail
    assert "test_mixing.py" in str(refusal.value.source_line)


@pytest.mark.parametrize("before", [True, False], ids=["before", "between"])
def test_mixing_refusal_unknown_operator(before: bool) -> None:
    """Such an operator may work token by token, so the reason is not token mixing."""
    with pytest.raises(UnsupportedGraphError, match=r"aten.flip.default is not known") as refusal:
        analyze(graph_of(flipped, before))
    assert (refusal.value.reason, refusal.value.node) == (Reason.UNKNOWN_OP, "flip")


def test_mixing_refusal_attention_alone() -> None:
    graph = graph_of(torch.tanh, before=False).graph_module.graph
    sites = find_sites(graph)
    assert mixing_refusal(graph, find_merges(graph, sites), sites) is None


def test_mixing_refusal_without_merge() -> None:
    def text(x: Tensor) -> Tensor:
        return x + attend(recurrence(x * 2))

    graph = capture(text, {"x": CALL["x"]}).graph_module.graph
    assert mixing_refusal(graph, [], find_sites(graph)) is None


def test_as_mixing_other_reasons() -> None:
    node = graph_of(torch.tanh, before=False).graph_module.graph.output_node()
    for reason in Reason:
        made = as_mixing(node, refuse(reason, node, "so"))
        assert made.reason is (Reason.TOKEN_MIXING if reason is Reason.TOKEN_AXIS_LOST else reason)
