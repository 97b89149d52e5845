"""When donors are looked up again in shared tiers."""

from __future__ import annotations

from vlcache_fx.store import Entry
from vlcache_fx.store.recheck import RECHECK_S, REMEMBERED, Recheck

DONOR = Entry({}, {"contexts": ["a"]})


def test_first_read_begins_the_time() -> None:
    now = [0.0]
    recheck = Recheck(lambda: now[0])
    assert not recheck.is_due("a", DONOR)
    now[0] = RECHECK_S
    assert recheck.is_due("a", DONOR)
    assert not recheck.is_due("a", DONOR)


def test_only_donors_are_due() -> None:
    now = [0.0]
    recheck = Recheck(lambda: now[0])
    for _ in range(3):
        now[0] += RECHECK_S
        assert not recheck.is_due("a", Entry({}, {}))


def test_bounded() -> None:
    recheck = Recheck()
    for number in range(REMEMBERED + 10):
        recheck.is_due(str(number), DONOR)
    assert len(recheck._asked) == REMEMBERED
