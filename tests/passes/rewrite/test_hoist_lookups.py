"""Lookups become inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlcache_fx.passes.rewrite import HoistLookups, InsertLookups, SpliceRows
from vlcache_fx.spec.slots import Donor, Key, Value

from ..programs import before_and_after, everything, nothing_stored, prepared, run, small, unchanged


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = prepared(small(rope="none")[0], InsertLookups(), SpliceRows())
    golden("hoist_lookups", before_and_after(HoistLookups(), program))


def test_tables_are_arguments() -> None:
    captured, graph, want = small()
    program = prepared(captured, InsertLookups(), SpliceRows(), HoistLookups())
    results = run(program, graph.calls[0], everything(captured), nothing_stored(program))
    assert torch.equal(results[0], want)
    assert not [node for node in program.graph.nodes if node.target is torch.ops.vlcache.lookup.default]
    assert [slot for slot in program.slots if isinstance(slot, Donor)] == [Donor(Key(0)), Donor(Value(0))]


def test_a_program_without_lookups_is_left_alone() -> None:
    assert unchanged(HoistLookups(), prepared(small()[0]))
