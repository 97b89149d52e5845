"""``splice_rows``: stored and recomputed rows are joined before positions enter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError
from vlcache_fx.ops import bind_donors
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import InsertLookups, RecordDonors, SpliceRows
from vlcache_fx.plan.types import Span
from vlcache_fx.spec.slots import Key, Source, Value

from ..programs import (
    LENGTH,
    START,
    TOKENS,
    PassCase,
    Rows,
    everything,
    everything_of_both,
    nothing_stored,
    own_donors,
    plan_for,
    plan_for_both,
    prepared,
    run,
    small,
    two_samples,
)

CASE = PassCase(SpliceRows(), (InsertLookups(),))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("splice_rows", CASE.shown(small()[0]))


@pytest.mark.parametrize("last_only", [True, False])
def test_all_rows_equal_model(last_only: bool) -> None:
    captured, graph, want = small(last_only=last_only)
    program = CASE.program(captured)
    with bind_donors(nothing_stored(program)):  # NaN if any of its rows is read
        assert torch.equal(run(program, graph.calls[0], everything(captured))[0], want)


def test_reads_stored_rows() -> None:
    """With its own keys and values as donor, an image is not recomputed."""
    captured, graph, want = small()
    program = CASE.program(captured)
    hit = Span(0, START, LENGTH, "key", True)
    plan = plan_for(program, TOKENS, [hit], Rows(((),)))
    cold = prepared(captured, RecordDonors(), warm=False)
    _, key, value = run(cold, graph.calls[0], plan)
    donors = {Key(0): key[:, START : START + LENGTH], Value(0): value[:, START : START + LENGTH]}
    # Rows are not restricted yet, so computed row j is at its own position.
    source = torch.where(plan.source[0] >= 0, plan.source[0], -1 - torch.arange(TOKENS))
    program.graph_module.recompile()
    with torch.no_grad(), bind_donors(donors):
        bound = [source if isinstance(slot, Source) else plan.rows[0] for slot in program.slots]
        assert torch.equal(program.graph_module(*graph.calls[0], *bound)[0], want)
        other = {slot: table + 1 for slot, table in donors.items()}
    with torch.no_grad(), bind_donors(other):
        assert not torch.equal(program.graph_module(*graph.calls[0], *bound)[0], want)


def test_graph_of_two_samples(golden: Callable[[str, str], None]) -> None:
    golden("splice_rows_two_samples", CASE.change(two_samples()[0]))


@pytest.mark.parametrize("last_only", [True, False])
def test_all_rows_of_two_samples_equal_model(last_only: bool) -> None:
    captured, graph, want = two_samples(last_only=last_only)
    program = CASE.program(captured)
    with bind_donors(nothing_stored(program)):
        assert torch.equal(run(program, graph.calls[0], everything_of_both(program))[0], want)


def test_reads_stored_rows_per_sample() -> None:
    captured, graph, want = two_samples()
    program = CASE.program(captured)
    plan = plan_for_both(program, Rows(((),)))
    source = plan.source[0]
    # As above: rows are not restricted yet.
    source = torch.where(source >= 0, source, -1 - torch.arange(TOKENS))
    donors = own_donors(captured, graph.calls[0])
    swapped = {slot: torch.cat(table.split(LENGTH, 1)[::-1], 1) for slot, table in donors.items()}
    program.graph_module.recompile()
    bound = [source if isinstance(slot, Source) else plan.rows[0] for slot in program.slots]
    with torch.no_grad(), bind_donors(donors):
        assert torch.equal(program.graph_module(*graph.calls[0], *bound)[0], want)
    with torch.no_grad(), bind_donors(swapped):
        got = program.graph_module(*graph.calls[0], *bound)[0]
    assert (got - want).flatten(1).abs().amax(1).min() > 1e-3


def test_requires_lookups() -> None:
    program = prepared(small()[0])
    before = str(program.graph)
    with pytest.raises(PassError, match=r"splice_rows.*requires lookups") as error:
        Pipeline((SpliceRows(),)).run(program)
    assert error.value.passes_before == ()
    assert str(program.graph) == before
