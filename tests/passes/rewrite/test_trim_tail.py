"""Behind the last layer, only what results need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import (
    HoistLookups,
    InsertLookups,
    KvOnlyRows,
    RestrictRows,
    SpliceRows,
    TrimTail,
)

from ..programs import before_and_after, everything, nothing_stored, prepared, run, small, unchanged

EARLIER = (InsertLookups(), SpliceRows(), HoistLookups(), RestrictRows(), KvOnlyRows())


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("trim_tail", before_and_after(TrimTail(), prepared(small(rope="none")[0], *EARLIER)))


@pytest.mark.parametrize("warm", [True, False])
def test_numbers(warm: bool) -> None:
    captured, graph, want = small()
    earlier = EARLIER if warm else (RestrictRows(), KvOnlyRows())
    program = prepared(captured, *earlier, TrimTail(), warm=warm)
    donors = nothing_stored(program) if warm else None
    results = run(program, graph.calls[0], everything(captured), donors)
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)


def test_results_of_all_rows_are_left_alone() -> None:
    assert unchanged(TrimTail(), prepared(small(last_only=False)[0], RestrictRows()))


def test_it_wants_restricted_rows() -> None:
    with pytest.raises(PassError, match=r"trim_tail.*requires rows_restricted"):
        Pipeline((TrimTail(),)).run(prepared(small()[0]))
