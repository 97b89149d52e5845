"""Decoding steps are recognised before capture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.capture.decode_step import is_decode_step
from vlcache_fx.testing.graphs import traced_graphs
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Attending(nn.Module):
    """Attention to keys of a cache."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(x, past, past)
        if self.kind == "flex":
            from torch.nn.attention.flex_attention import flex_attention

            result: Any = flex_attention(x, past, past)
            return result
        scores = x @ past.mT
        weights = {
            "method": scores.softmax,
            "function": lambda dim: F.softmax(scores, dim),
            "torch": lambda dim: torch.softmax(scores, dim),
            "none": lambda dim: scores,
        }[self.kind](-1)
        return weights @ past + x


def traced(model: nn.Module, dynamic: bool, **call: Tensor) -> bool:
    (graph,) = traced_graphs(model, call, dynamic=dynamic)
    return is_decode_step(graph.graph_module.graph)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["sdpa", "flex", "method", "function", "torch"])
def test_is_decode_step_single_query(kind: str, dynamic: bool) -> None:
    past = torch.ones(1, 2, 9, 16)
    assert traced(Attending(kind), dynamic, x=torch.ones(1, 2, 1, 16), past=past)
    assert not traced(Attending(kind), dynamic, x=torch.ones(1, 2, 4, 16), past=past)


def test_is_decode_step_without_attention() -> None:
    assert not traced(Attending("none"), True, x=torch.ones(1, 2, 1, 16), past=torch.ones(1, 2, 9, 16))


def test_is_decode_step_with_merge() -> None:
    class Merging(Attending):
        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            return super().forward(x.masked_scatter(x > 0, past), past)

    assert not traced(Merging("sdpa"), True, x=torch.ones(1, 2, 1, 16), past=torch.ones(1, 2, 9, 16))


def test_is_decode_step_prefill() -> None:
    assert not traced(tiny_vlm(), True, **tiny_vlm_inputs(3, 2, [(5, 0)]))
    assert not traced(tiny_vlm(attention="math"), True, **tiny_vlm_inputs(9, 2, []))
