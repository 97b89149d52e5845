"""Graphs that attend to items through cross-attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.cross_attention import CrossAttention
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from ..runtime.helpers import own_compiler_state
from .graphs import PROMPT, CrossAttending, cross_call, traced, traced_call


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_match_cross_attention() -> None:
    found = CrossAttention.match(traced(CrossAttending(), cross_call(0, 0)))
    assert found is not None
    assert found.split.computes
    assert found.explain().encoder_in_graph
    assert CrossAttention.match(traced(tiny_vlm(), PROMPT)) is None


def test_compile_stores_keys_and_values(eager: Engine) -> None:
    model, call = CrossAttending().eval(), cross_call(0, 0)
    graph, args = traced_call(model, call)
    found = CrossAttention.match(graph)
    assert found is not None
    run = found.compile(eager)
    for mode in ("cold", "warm"):
        with torch.no_grad():
            torch.testing.assert_close(run(*args)[0], model(**call))
        assert eager.last_report is not None
        assert eager.last_report.mode == mode
