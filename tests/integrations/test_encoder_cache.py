"""The grids of media items reach policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from vlcache_fx.policies import Policy, SpanContext
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

from ..runtime.helpers import own_compiler_state, with_api


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


asked: list[SpanContext] = []


@dataclass(frozen=True)
class Noting(Policy):
    """No rows; notes the spans."""

    name: ClassVar[str] = "noting"

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        asked.append(span)
        return (torch.empty(0, dtype=torch.int64),) * span.num_layers


def test_call_passes_grids_to_the_policy() -> None:
    pair = with_api(tiny_qwen2_5_vl(1), policy=Noting(), min_span_tokens=4)
    for before in (4, 7):
        asked.clear()
        pair.run(**qwen_inputs(before, 5, [(8, 8, 0), (4, 12, 1)], text_seed=before))
    first, second = asked
    assert (first.length, first.grid, first.start) == (16, (1, 4, 4), 7 + 1)
    assert (second.length, second.grid) == (12, (1, 2, 6))
    assert first.num_tokens == second.num_tokens == 7 + 18 + 2 + 14 + 5
    assert (first.text_before, first.text_after) == (8, 1 + 2 + 2 + 5)


def test_call_without_grids() -> None:
    pair = with_api(tiny_llava(1), policy=Noting(), min_span_tokens=4)
    for before in (4, 7):
        asked.clear()
        pair.run(**llava_inputs(before, 5, [0], text_seed=before))
    assert [span.grid for span in asked] == [None]
