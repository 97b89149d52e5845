"""Masks are made of the active rows only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.passes.rewrite import (
    HoistLookups,
    InsertLookups,
    RestrictMasks,
    RestrictRows,
    SpliceRows,
    TrimTail,
)
from vlcache_fx.plan.types import Span

from ..programs import (
    LENGTH,
    START,
    Rows,
    before_and_after,
    everything,
    nothing_stored,
    plan_for,
    prepared,
    run,
    small,
    unchanged,
)

EARLIER = (InsertLookups(), SpliceRows(), HoistLookups(), RestrictRows())
MASKED = {"explicit_mask": True, "rope": "none"}


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("restrict_masks", before_and_after(RestrictMasks(), prepared(small(**MASKED)[0], *EARLIER)))


def test_all_rows_is_the_unmodified_model() -> None:
    captured, graph, want = small(**MASKED)
    program = prepared(captured, *EARLIER, TrimTail(), RestrictMasks())
    results = run(program, graph.calls[0], everything(captured), nothing_stored(program))
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offsets", [(), (0,), (0, 2), (1, 3, 4)], ids=str)
def test_rows_see_what_they_saw(offsets: tuple[int, ...]) -> None:
    """Bit by bit what a gather of the whole mask gives."""
    captured, graph, _ = small(**MASKED)
    tokens = everything(captured).num_tokens
    results = []
    for more in ((), (RestrictMasks(),)):
        program = prepared(captured, *EARLIER, TrimTail(), *more)
        plan = plan_for(program, tokens, [Span(0, START, LENGTH, "key", True)], Rows((offsets,)))
        donors = {slot: torch.zeros_like(rows) for slot, rows in nothing_stored(program).items()}
        results.append(run(program, graph.calls[0], plan, donors)[0])
    assert torch.equal(*results)


def test_without_masks_nothing_changes() -> None:
    assert unchanged(RestrictMasks(), prepared(small(rope="none")[0], *EARLIER))
