"""``trim_tail``: only the rows that results need are computed after the last layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import (
    KvOnlyRows,
    RestrictRows,
    TrimTail,
)

from ..programs import (
    LOOKUPS,
    PassCase,
    Rows,
    own_donors,
    plan_for_both,
    prepared,
    run,
    small,
    two_samples,
    unchanged,
)

CASE = PassCase(TrimTail(), (*LOOKUPS, RestrictRows(), KvOnlyRows()))
COLD_CASE = PassCase(TrimTail(), (RestrictRows(), KvOnlyRows()))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("trim_tail", CASE.shown(small(rope="none")[0]))


@pytest.mark.parametrize("warm", [True, False])
def test_numbers(warm: bool) -> None:
    case = CASE if warm else COLD_CASE
    case.check_all_rows(*small(), warm=warm)


def test_graph_of_two_samples(golden: Callable[[str, str], None]) -> None:
    golden("trim_tail_two_samples", CASE.change(two_samples()[0]))


@pytest.mark.parametrize("warm", [True, False])
def test_numbers_of_two_samples(warm: bool) -> None:
    case = CASE if warm else COLD_CASE
    case.check_all_rows(*two_samples(), warm=warm)


@pytest.mark.parametrize("explicit_mask", [True, False])
def test_numbers_per_sample(explicit_mask: bool) -> None:
    captured, graph, want = two_samples(num_layers=2, explicit_mask=explicit_mask)
    program = CASE.program(captured)
    plan = plan_for_both(program, Rows(((0, 3), (3,))), Rows(((), ())))
    assert plan.rows_per_layer == (7, 6, 2)
    got = run(program, graph.calls[0], plan, own_donors(captured, graph.calls[0]))[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_keeps_results_of_all_rows() -> None:
    assert unchanged(TrimTail(), prepared(small(last_only=False)[0], RestrictRows()))


def test_requires_rows_restricted() -> None:
    with pytest.raises(PassError, match=r"trim_tail.*requires rows_restricted"):
        Pipeline((TrimTail(),)).run(prepared(small()[0]))
