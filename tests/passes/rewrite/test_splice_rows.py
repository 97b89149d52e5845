"""Stored and recomputed rows come together before positions enter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError
from vlcache_fx.ops import bind_donors
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import InsertLookups, RecordDonors, SpliceRows
from vlcache_fx.plan.types import Span

from ..programs import (
    LENGTH,
    START,
    TOKENS,
    Rows,
    before_and_after,
    everything,
    nothing_stored,
    plan_for,
    prepared,
    run,
    small,
)


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = prepared(small()[0], InsertLookups())
    golden("splice_rows", before_and_after(SpliceRows(), program))


@pytest.mark.parametrize("last_only", [True, False])
def test_all_rows_computed_is_the_unmodified_model(last_only: bool) -> None:
    captured, graph, want = small(last_only=last_only)
    program = prepared(captured, InsertLookups(), SpliceRows())
    with bind_donors(nothing_stored(program)):  # NaN, should any row of it be read
        assert torch.equal(run(program, graph.calls[0], everything(captured))[0], want)


def test_stored_rows_are_read_for_the_others() -> None:
    """With its own keys and values as the donor, an image need not be computed."""
    captured, graph, want = small()
    program = prepared(captured, InsertLookups(), SpliceRows())
    hit = Span(0, START, LENGTH, "key", True)
    plan = plan_for(program, TOKENS, [hit], Rows(((),)))
    cold = prepared(captured, RecordDonors(), warm=False)
    _, key, value = run(cold, graph.calls[0], plan)
    donors = {"0.k": key[:, START : START + LENGTH], "0.v": value[:, START : START + LENGTH]}
    # The rows are not restricted yet, so computed row j of the plan stands at its own position.
    source = torch.where(plan.source[0] >= 0, plan.source[0], -1 - torch.arange(TOKENS))
    program.graph_module.recompile()
    with torch.no_grad(), bind_donors(donors):
        bound = [source if slot.startswith("source") else plan.rows[0] for slot in program.slots]
        assert torch.equal(program.graph_module(*graph.calls[0], *bound)[0], want)
        other = {slot: table + 1 for slot, table in donors.items()}
    with torch.no_grad(), bind_donors(other):
        assert not torch.equal(program.graph_module(*graph.calls[0], *bound)[0], want)


def test_without_lookups_it_does_not_run() -> None:
    program = prepared(small()[0])
    before = str(program.graph)
    with pytest.raises(PassError, match=r"splice_rows.*requires lookups") as error:
        Pipeline((SpliceRows(),)).run(program)
    assert error.value.passes_before == ()
    assert str(program.graph) == before
