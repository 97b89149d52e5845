"""``invert_permutations``: the inverse of a permutation becomes a sort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.passes.cleanup import InvertPermutations

from ..programs import before_and_after, unchanged
from .graphs import program_of

KEYS = torch.tensor([2, 0, 1, 2, 0, 1, 1])


def by_sort(keys: Tensor) -> tuple[Tensor, ...]:
    """Restore the order of tokens as in mixtures of experts; permutation and base have other readers."""
    _, order = keys.sort()
    base = order.new_empty(7)
    inverse = torch.index_put(base, [order], torch.arange(7))
    return inverse * 2, order, base.shape[0] * inverse


def by_argsort(keys: Tensor) -> tuple[Tensor, ...]:
    order = keys.argsort()
    return (torch.index_put(torch.zeros_like(order), [order], torch.arange(7)),)


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("invert_permutations", before_and_after(InvertPermutations(), program_of(by_sort, KEYS)))


@pytest.mark.parametrize("function", [by_sort, by_argsort])
def test_numbers(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    program = program_of(function, KEYS)
    assert InvertPermutations().run(program)
    program.graph.lint()
    program.graph_module.recompile()
    assert "index_put" not in str(program.graph)
    generator = torch.Generator().manual_seed(0)
    for keys in (KEYS, *(torch.randint(0, 4, (7,), generator=generator) for _ in range(20))):
        for got, want in zip(program.graph_module(keys), function(keys), strict=True):
            assert torch.equal(got, want)


def put(keys: Tensor, values: Tensor, **options: bool) -> tuple[Tensor]:
    order = keys.argsort()
    return (torch.index_put(torch.zeros_like(values), [order], values, **options),)


OTHERS: dict[str, Callable[[Tensor], tuple[Tensor]]] = {
    "accumulates": lambda keys: put(keys, torch.arange(7), accumulate=True),
    "counts from one": lambda keys: put(keys, torch.arange(1, 8)),
    "counts in steps": lambda keys: put(keys, torch.arange(0, 14, 2)),
    "of another dtype": lambda keys: put(keys, torch.arange(7, dtype=torch.int32)),
    "values of the request": lambda keys: put(keys, keys),
    "no permutation": lambda keys: (torch.index_put(torch.zeros_like(keys), [keys], torch.arange(7)),),
    "sorted values": lambda keys: (torch.index_put(keys, [keys.sort()[0]], torch.arange(7)),),
    "places among more": lambda keys: (
        torch.index_put(keys.new_zeros(9), [keys.argsort()], torch.arange(7)),
    ),
    "rows": lambda keys: (
        torch.index_put(keys.new_zeros(7, 2), [keys.argsort()], torch.arange(2).expand(7, 2)),
    ),
    "two indices": lambda keys: (
        torch.index_put(keys.new_zeros(7, 7), [keys.argsort(), keys.argsort()], torch.arange(7)),
    ),
    "of each row": lambda keys: (
        torch.index_put(keys.new_zeros(1, 7), [keys[None].argsort()[:, :1]], torch.arange(7)),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_keeps_other_writes(name: str) -> None:
    assert unchanged(InvertPermutations(), program_of(OTHERS[name], KEYS))
