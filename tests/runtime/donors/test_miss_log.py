"""Recent lookups and misses."""

from __future__ import annotations

import pytest

from vlcache_fx.errors import Reason
from vlcache_fx.runtime.donors import recent_keys
from vlcache_fx.runtime.donors.miss_log import Miss, MissLog, with_eviction
from vlcache_fx.runtime.donors.recent_keys import RecentLookups
from vlcache_fx.store.base import Eviction


def parts(content: str, **others: str) -> dict[str, str]:
    return {"salt": "one", "weights": "w", "content": content, **others}


def test_reasons_of_lookups() -> None:
    log = MissLog()
    assert log.note("a", parts("x")) is Reason.NEW_ITEM
    assert log.note("a", parts("x")) is Reason.NOT_RECORDED
    assert log.note("b", parts("x", weights="v")) is Reason.OTHER_WEIGHTS
    assert log.note("c", parts("y")) is Reason.NEW_ITEM
    log.clear()
    assert log.note("a", parts("x")) is Reason.NEW_ITEM


def test_lookups_of_another_tenant_do_not_count() -> None:
    log = MissLog()
    log.note("a", parts("x"))
    assert log.note("b", parts("x", salt="two")) is Reason.NEW_ITEM
    assert log.note("c", parts("x", salt="two", weights="v")) is Reason.OTHER_WEIGHTS
    assert log.note("d", parts("x", salt="three", weights="u")) is Reason.NEW_ITEM


def test_same_pixels() -> None:
    log = MissLog()
    log.note("a", {**parts("x"), "encoder.content": "pixels", "encoder.fields": "1"})
    same = {**parts("y"), "encoder.content": "pixels", "encoder.fields": "2"}
    assert log.note("b", same) is Reason.OTHER_ENCODING


def test_lookups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_keys, "MAX_KEYS", 8)
    monkeypatch.setattr("vlcache_fx.runtime.donors.miss_log.MAX_KEYS", 8)
    lookups, log = RecentLookups(), MissLog()
    for number in range(50):
        lookup, _ = lookups.add(f"key {number}", {"content": "same", "encoder.content": f"{number}"})
        log.add(f"key {number}", Miss(Reason.NEW_ITEM))
        assert all(other.number < lookup.number for other in lookups.related(lookup))
    assert [lookup.key for lookup in lookups.before(100)] == [f"key {number}" for number in range(42, 50)]
    assert len(lookups._by_subject) == 8 + 1
    assert lookups.get("key 0") is None
    assert log.get("key 0") is None
    assert log.get("key 49") == Miss(Reason.NEW_ITEM)


def test_present_lookup_keeps_its_number() -> None:
    lookups = RecentLookups()
    first, _ = lookups.add("a", {"content": "x"})
    lookups.add("b", {"content": "x"})
    assert lookups.add("a", {"content": "x"}) == (first, True)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("capacity", Reason.EVICTED), ("damaged", Reason.DAMAGED_ENTRY), ("cleared", Reason.NEW_ITEM),
    ],
)  # fmt: skip
def test_evictions(cause: str, reason: Reason) -> None:
    eviction = Eviction("a", "file", 1.0, cause, 10, "another tenant's key")
    miss = with_eviction(Reason.NEW_ITEM, eviction)
    assert (miss.reason, miss.eviction) == (reason, eviction)
    assert "tenant" not in miss.detail  # the detail is in reports
    assert with_eviction(Reason.NEW_ITEM, None) == Miss(Reason.NEW_ITEM)
