"""Graphs with a merge and without attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.merge import Merge
from vlcache_fx.runtime.requests.marked_spans import marked_spans
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from ..runtime.helpers import own_compiler_state
from .graphs import MERGE, PROMPT, Merging, traced, traced_call


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_match_merge() -> None:
    assert Merge.match(traced(Merging(), MERGE)) is not None
    assert Merge.match(traced(tiny_vlm(), PROMPT)) is None


def test_compile_marks_spans(eager: Engine) -> None:
    graph, args = traced_call(Merging(), MERGE)
    found = Merge.match(graph)
    assert found is not None
    with torch.no_grad():
        (embeds,) = found.compile(eager)(*args)
    assert torch.equal(embeds, Merging()(**MERGE))
    assert marked_spans(embeds) == ((0, 0, 7),)
    assert eager.last_report is None
