"""Operators that draw random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from vlcache_fx.analysis.randomness import draws_numbers

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "arguments", "draws"),
    [
        (aten.dropout.default, (0.1, True), True),
        (aten.dropout.default, (0.1, False), False),
        (aten.dropout.default, (0.0, True), False),
        (aten.rand_like.default, (), True),
        (aten.exp.default, (), False),
    ],
)
def test_draws_numbers_by_arguments(target: object, arguments: tuple[object, ...], draws: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert draws_numbers(graph.call_function(target, (x, *arguments))) is draws  # type: ignore[arg-type]


def test_draws_numbers_in_attention() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    sdpa = aten.scaled_dot_product_attention.default
    assert draws_numbers(graph.call_function(sdpa, (x, x, x), {"dropout_p": 0.1}))
    assert draws_numbers(graph.call_function(sdpa, (x, x, x, None, 0.1)))
    assert not draws_numbers(graph.call_function(sdpa, (x, x, x)))
