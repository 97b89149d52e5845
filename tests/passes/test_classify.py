"""What a graph is: the same for the backend and for explanations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.passes.classify import GraphKind, classify
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

PROMPT = tiny_vlm_inputs(3, 5, [(20, 0)])


class Merging(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        return x.masked_scatter(mask, features)


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.linear(pixels)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Adding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


MERGE = {
    "x": torch.zeros(1, 7, 4),
    "mask": torch.ones(1, 7, 4, dtype=torch.bool),
    "features": torch.ones(7, 4),
}


@pytest.mark.parametrize(
    ("model", "call", "kind", "has_encoder"),
    [
        (tiny_vlm(), PROMPT, GraphKind.DECODER, True),
        (Merging(), MERGE, GraphKind.MERGE, False),
        (Looking(), {"pixels": torch.ones(1, 2, 5, 8)}, GraphKind.ENCODER, False),
    ],
)
def test_kinds(model: Any, call: dict[str, Tensor], kind: GraphKind, has_encoder: bool) -> None:
    found = classify(captured_graph(model, call)[0])
    assert found.kind is kind
    assert (found.split is not None) is has_encoder
    assert (found.facts is not None) is (kind is GraphKind.DECODER)


def test_what_is_none_of_them_is_refused() -> None:
    text = {"input_ids": PROMPT["input_ids"][:, :3]}
    with pytest.raises(UnsupportedGraphError) as refused:
        classify(captured_graph(tiny_vlm(), text)[0])
    assert refused.value.reason is Reason.NO_MERGE
    with pytest.raises(UnsupportedGraphError) as refused:
        classify(captured_graph(Adding(), {"x": torch.ones(2)})[0])
    assert refused.value.reason is Reason.NO_ATTENTION
