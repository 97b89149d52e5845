"""Positions of a call's tokens among the keys of its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.compiler.builders.key_moves import key_moves
from vlcache_fx.ir import Captured
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.runtime.requests.key_tokens import key_tokens

from ..graphs import capture

X = torch.randn(1, 6, 4)


def after(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([past, new], 2)


def between(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([past[:, :, :1], new, past[:, :, 1:]], 2)


def cut(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([past, new], 2)[:, :, -5:]


def cut_in_between(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([past, new], 2)[:, :, 2:7]


def written(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.zeros(1, 1, 10, 4).index_copy(2, position, new)


def put(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    buffer = torch.zeros(1, 1, 10, 4)
    buffer[:, :, position] = new
    return buffer


def first_rows(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    buffer = torch.zeros(1, 1, 9, 4)
    buffer[:, :, 2:8] = new
    return buffer


def written_then_joined(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([past, written(new, past, position)], 2)[:, :, 1:]


def mirrored(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([past, new], 2).flip(2)


def twice(new: Tensor, past: Tensor, position: Tensor) -> Tensor:
    return torch.cat([new, past, new], 2)


def facts_of(join: Callable[..., Tensor], **options: Any) -> tuple[Captured, DecoderFacts]:
    def model(x: Tensor, past: Tensor, position: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys = join(key(x)[:, None], past, position)
        mask = torch.ones(6, keys.shape[2], dtype=torch.bool).tril()
        return x + F.scaled_dot_product_attention(x[:, None], keys, keys, attn_mask=mask)[:, 0]

    call = {"x": X, "past": torch.randn(1, 1, 3, 4), "position": torch.tensor([7, 1, 2, 3, 0, 9])}
    captured = capture(model, call, key=nn.Linear(4, 4), **options)
    return captured, analyze(captured)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("join", "tokens"),
    [
        (after, [-1, -1, -1, 0, 1, 2, 3, 4, 5]),
        (between, [-1, 0, 1, 2, 3, 4, 5, -1, -1]),
        (cut, [1, 2, 3, 4, 5]),
        (cut_in_between, [-1, 0, 1, 2, 3]),
        (written, [4, 1, 2, 3, -1, -1, -1, 0, -1, 5]),
        (put, [4, 1, 2, 3, -1, -1, -1, 0, -1, 5]),
        (first_rows, [-1, -1, 0, 1, 2, 3, 4, 5, -1]),
        (written_then_joined, [-1, -1, 4, 1, 2, 3, -1, -1, -1, 0, -1, 5]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_cache_paths_key_tokens(join: Callable[..., Tensor], tokens: list[int], dynamic: bool | None) -> None:
    captured, facts = facts_of(join, dynamic=dynamic)
    ((keys, values),) = facts.caches
    assert keys.is_known
    assert values.is_known
    assert facts.past
    call = {(1, 6, 4): X, (1, 1, 3, 4): torch.zeros(1, 1, 3, 4), (6,): torch.tensor([7, 1, 2, 3, 0, 9])}
    args = [
        call.get(tuple(map(int, value.shape)), value) if isinstance(value, Tensor) else int(value)
        for value in (node.meta["val"] for node in captured.placeholders)
    ]
    needed: dict[Node, int] = {}
    moves = key_moves(keys.ops, needed)
    assert key_tokens(moves, 6, extract(captured.graph_module, list(needed))(*args)).tolist() == tokens
    # Keys and values come from before the join.
    assert facts.layers[0].key_frontier.meta["val"].shape[1] == 6


@pytest.mark.parametrize("join", [mirrored, twice])
def test_cache_paths_unknown(join: Callable[..., Tensor]) -> None:
    _, facts = facts_of(join)
    assert not facts.caches[0][0].is_known


def test_cache_paths_without_cache() -> None:
    _, facts = facts_of(lambda new, past, position: new)
    assert facts.caches[0][0].ops == ()
    assert facts.caches[0][0].is_known
    assert facts.past == frozenset()
