"""``insert_lookups``: every frontier gets a lookup, without readers so far."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError, StoreError
from vlcache_fx.ops import bind_donors
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import InsertLookups

from ..programs import bare, before_and_after, everything, nothing_stored, prepared, run, small


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("insert_lookups", before_and_after(InsertLookups(), prepared(small(rope="none")[0])))


def test_lookups_have_no_readers() -> None:
    captured, graph, want = small()
    program = prepared(captured, InsertLookups())
    with bind_donors(nothing_stored(program)):
        assert torch.equal(run(program, graph.calls[0], everything(captured))[0], want)
    with pytest.raises(StoreError, match=r"no donor table is bound for slot '0.k'"):
        run(program, graph.calls[0], everything(captured))


def test_slots_and_dims() -> None:
    program = prepared(small(last_only=False, num_layers=2, qk_norm=True)[0], InsertLookups())
    lookups = {str(node.meta["slot"]): node for node in program.graph.nodes if "slot" in node.meta}
    assert sorted(lookups) == ["0.k", "0.v", "1.k", "1.v", "residual"]
    assert lookups["0.k"].args[2] == 2  # after the norm: [1, heads, tokens, head_dim]
    assert lookups["0.v"].args[2] == 1  # the projection itself: [1, tokens, width]
    assert lookups["residual"].args[2] == 1


def test_requires_facts() -> None:
    program = bare(small()[0])
    before = str(program.graph)
    with pytest.raises(PassError, match=r"insert_lookups.*requires facts"):
        Pipeline((InsertLookups(),)).run(program)
    assert str(program.graph) == before
