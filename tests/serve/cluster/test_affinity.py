"""Which replica gets a request, without Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.clock import Clock
from vlcache_fx.serve.cluster import affinity
from vlcache_fx.serve.cluster.affinity import Affinity


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def found(clock: Clock) -> Affinity:
    return Affinity(imbalance=2, trust_s=30, clock=clock)


def test_a_new_picture_goes_to_the_least_busy(found: Affinity) -> None:
    assert found.rank(["p"], {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]


def test_a_picture_goes_where_it_was_sent(found: Affinity) -> None:
    found.sent(["p"], "a")
    assert found.rank(["p"], {"a": 2, "b": 0, "c": 1})[0] == "a"
    assert found.rank(["other"], {"a": 2, "b": 0, "c": 1})[0] == "b"


def test_not_where_too_many_wait(found: Affinity) -> None:
    found.sent(["p"], "a")
    assert found.rank(["p"], {"a": 3, "b": 0}) == ["b", "a"]
    assert found.rank(["p"], {"a": 3, "b": 1}) == ["a", "b"]


def test_most_pictures_win_then_the_shorter_queue(found: Affinity) -> None:
    found.reported("a", ["p"])
    found.reported("b", ["p", "q"])
    found.reported("c", ["q", "p"])
    assert found.rank(["p", "q"], {"a": 0, "b": 2, "c": 1}) == ["c", "b", "a"]


def test_a_picture_that_a_replica_does_not_name_is_forgotten_in_time(found: Affinity, clock: Clock) -> None:
    found.sent(["p"], "a")
    found.reported("a", [])
    clock.now = 29
    assert found.num_held(["p"], "a") == 1
    clock.now = 31
    assert found.num_held(["p"], "a") == 0
    found.reported("a", ["p"])
    assert found.num_held(["p"], "a") == 1


def test_replicas_that_are_gone_are_forgotten(found: Affinity) -> None:
    found.sent(["p"], "a")
    found.sent(["p"], "b")
    found.reported("a", ["p"])
    found.retain(["b"])
    assert (found.num_held(["p"], "a"), found.num_held(["p"], "b")) == (0, 1)


def test_replicas_to_avoid_come_last_and_set_no_bound(found: Affinity) -> None:
    found.sent(["p"], "a")
    assert found.rank(["p"], {"a": 0, "b": 9, "c": 8}, avoid=["a"]) == ["c", "b", "a"]


def test_memory_is_bounded(found: Affinity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MAX_PICTURES", 2)
    for picture in ("p", "q", "p", "r"):
        found.sent([picture], "a")
    assert [found.num_held([picture], "a") for picture in "pqr"] == [1, 0, 1]


def test_routers_agree_on_new_pictures_and_spread_them() -> None:
    one, other = Affinity(2, 30), Affinity(2, 30)
    names = [f"p{index}" for index in range(200)]
    first = [one.rank([name], {"a": 0, "b": 0})[0] for name in names]
    assert first == [other.rank([name], {"b": 0, "a": 0})[0] for name in names]
    assert 60 < first.count("a") < 140


NAMES = st.sampled_from("abcd")


@given(
    queues=st.dictionaries(NAMES, st.integers(0, 9)),
    sent=st.lists(st.tuples(st.sampled_from("pqr"), NAMES)),
    pictures=st.lists(st.sampled_from("pqr"), unique=True),
    avoid=st.sets(NAMES),
)
def test_ranks_name_each_replica_once(
    queues: dict[str, int], sent: list[tuple[str, str]], pictures: list[str], avoid: set[str]
) -> None:
    found = Affinity(imbalance=2, trust_s=30, clock=lambda: 0.0)
    for picture, replica in sent:
        found.sent([picture], replica)
    ranked = found.rank(pictures, queues, avoid)
    assert sorted(ranked) == sorted(queues)
    usable = [name for name in queues if name not in avoid]
    if usable:
        best = ranked[0]
        assert best in usable
        assert queues[best] <= min(queues[name] for name in usable) + 2
        rivals = [name for name in usable if queues[name] <= min(map(queues.get, usable)) + 2]  # type: ignore[type-var,arg-type]
        assert found.num_held(pictures, best) == max(found.num_held(pictures, name) for name in rivals)
