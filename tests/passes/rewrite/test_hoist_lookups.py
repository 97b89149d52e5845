"""``hoist_lookups``: lookups become inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlcache_fx.passes.rewrite import HoistLookups, InsertLookups, SpliceRows
from vlcache_fx.spec.slots import Donor, Key, Value

from ..programs import PassCase, everything, nothing_stored, prepared, run, small, unchanged

CASE = PassCase(HoistLookups(), (InsertLookups(), SpliceRows()))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("hoist_lookups", CASE.shown(small(rope="none")[0]))


def test_tables_become_arguments() -> None:
    captured, graph, want = small()
    program = CASE.program(captured)
    results = run(program, graph.calls[0], everything(captured), nothing_stored(program))
    assert torch.equal(results[0], want)
    assert not [node for node in program.graph.nodes if node.target is torch.ops.vlcache.lookup.default]
    assert [slot for slot in program.slots if isinstance(slot, Donor)] == [Donor(Key(0)), Donor(Value(0))]


def test_keeps_program_without_lookups() -> None:
    assert unchanged(HoistLookups(), prepared(small()[0]))
