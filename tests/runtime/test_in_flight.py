"""Requests that miss one key: one computes, the others wait, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from vlcache_fx.runtime import in_flight
from vlcache_fx.runtime.in_flight import Claim, InFlight, Missing
from vlcache_fx.runtime.pace import Pace

THREADS = 8
FOR_EVER_S = 60.0  # a failure of the test, not of the machine


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "LEAST_PATIENCE_S", FOR_EVER_S)


class Service:
    """Computes keys and stores them in a set; counts computations."""

    def __init__(self, *, stores: bool = True, expected_s: float | None = None) -> None:
        self.flights, self.stored, self.computed = InFlight(), set[str](), Counter[str]()
        self._stores, self._expected_s = stores, expected_s
        self.begins: Callable[[], None] = lambda: None

    def claimed(self, *keys: str, may_wait: bool = True) -> tuple[set[str], Claim]:
        """Return the missing keys and the claim on them."""

        def find(_: set[str] | None) -> set[str]:
            return {key for key in keys if key not in self.stored}

        def missing(found: set[str]) -> Missing:
            return Missing(found, found, self._expected_s)

        return self.flights.find_or_claim(find, missing, may_wait=may_wait)

    def request(self, *keys: str) -> float:
        """Serve one request; return how long it waited, in seconds."""
        absent, claim = self.claimed(*keys)
        with claim:
            if absent:
                self.begins()
                self.computed.update(absent)
                if self._stores:
                    self.stored |= absent
                claim.end(absent if self._stores else ())
        return claim.waited_s


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + FOR_EVER_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def waiting(service: Service) -> int:
    """Return the number of requests that wait."""
    return len(service.flights._changed._waiters)  # type: ignore[attr-defined]


def test_one_computes_and_all_others_wait(pool: ThreadPoolExecutor) -> None:
    service = Service()
    service.begins = lambda: until(lambda: waiting(service) == THREADS - 1)
    waits = list(pool.map(service.request, ["a"] * THREADS))
    assert service.computed == {"a": 1}
    assert sum(waited_s > 0 for waited_s in waits) == THREADS - 1


def test_first_fails_and_another_computes(pool: ThreadPoolExecutor) -> None:
    service, failures = Service(), []

    def fails_once() -> None:
        if not failures:
            failures.append(None)
            until(lambda: waiting(service) == THREADS - 1)
            raise ValueError("the first fails")

    service.begins = fails_once
    done = [pool.submit(service.request, "a") for _ in range(THREADS)]
    wait(done)
    assert sum(one.exception() is not None for one in done) == 1
    assert service.computed == {"a": 1}


def test_refused_entries_release_all(pool: ThreadPoolExecutor) -> None:
    """If the store keeps nothing, all that waited compute side by side, not one after another."""
    service, first, others = Service(stores=False), [], threading.Barrier(THREADS - 1)

    def begins() -> None:
        if not first:
            first.append(None)
            until(lambda: waiting(service) == THREADS - 1)
        else:
            others.wait(FOR_EVER_S)  # passes only if all the others compute at the same time

    service.begins = begins
    list(pool.map(service.request, ["a"] * THREADS))
    assert service.computed == {"a": THREADS}


def test_entry_that_is_gone_at_once_is_waited_for_once(pool: ThreadPoolExecutor) -> None:
    service = Service()
    service.stored = Forgetful()
    service.begins = lambda: None
    list(pool.map(service.request, ["a"] * THREADS))
    assert 1 <= service.computed["a"] <= THREADS


class Forgetful(set[str]):
    """A store that evicts everything at once."""

    def __ior__(self, _: object) -> Forgetful:  # type: ignore[override,misc]
        return self


def test_crossed_keys(pool: ThreadPoolExecutor) -> None:
    service, both = Service(), threading.Barrier(2)
    service.begins = lambda: until(lambda: waiting(service) == 1)

    def crossed(*keys: str) -> float:
        both.wait(FOR_EVER_S)
        return service.request(*keys)

    done = [pool.submit(crossed, *keys) for keys in (("a", "b"), ("b", "a"))]
    assert sum(one.result() > 0 for one in done) == 1
    assert service.computed == {"a": 1, "b": 1}


def test_claims_of_several_requests_are_awaited(pool: ThreadPoolExecutor) -> None:
    service, go = Service(), threading.Event()
    service.begins = lambda: go.wait(FOR_EVER_S) and None
    done = [pool.submit(service.request, key) for key in "ab"]
    until(lambda: len(service.flights._claims) == 2)
    done.append(pool.submit(service.request, "a", "b"))
    until(lambda: waiting(service) == 1)
    go.set()
    assert done[-1].result() > 0
    assert service.computed == {"a": 1, "b": 1}


def test_request_with_claim_never_waits(pool: ThreadPoolExecutor) -> None:
    service = Service()
    (_, own), other = service.claimed("a"), pool.submit(service.claimed, "b").result()
    with own:
        absent, inner = service.claimed("b", "c")  # b is the other's
        with inner:
            assert (absent, inner.keys, inner.waited_s) == ({"b", "c"}, {"c"}, 0)
        assert asyncio.run(asyncio.to_thread(service.claimed, "b"))[1].waited_s == 0  # nor what it starts
    other[1].end()


def test_thread_never_waits_for_itself() -> None:
    service = Service()
    _, outer = service.claimed("a")  # not entered: as a coroutine that another one interrupts
    absent, inner = service.claimed("a")
    assert (absent, inner.keys) == ({"a"}, frozenset())
    outer.end()


def test_holder_of_a_lock_does_not_wait(pool: ThreadPoolExecutor) -> None:
    service = Service()
    _, other = pool.submit(service.claimed, "a").result()
    _, claim = service.claimed("a", may_wait=False)
    assert (claim.keys, claim.waited_s) == (frozenset(), 0)
    other.end()


def test_waits_no_longer_than_computing(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "LEAST_PATIENCE_S", 0.01)
    service = Service(expected_s=0.01)
    _, hangs = pool.submit(service.claimed, "a").result()
    assert service.request("a") > 0
    assert service.computed == {"a": 1}
    hangs.end()


def test_does_not_wait_for_what_ends_later(pool: ThreadPoolExecutor) -> None:
    service = Service(expected_s=10 * FOR_EVER_S)
    _, slow = pool.submit(service.claimed, "a").result()
    quick = Service(expected_s=0.01)
    quick.flights = service.flights
    assert quick.request("a") == 0
    slow.end()


def test_interrupted_claim_ends(pool: ThreadPoolExecutor) -> None:
    service = Service()
    pool.submit(lambda: service.claimed("a")[0]).result()  # never entered
    assert service.request("a") == 0
    assert service.computed == {"a": 1}


def test_stored_between_lookup_and_claim() -> None:
    """A request that looked up just before another stored the key looks up again."""
    service, found = Service(), []

    def find(before: bool | None) -> bool:
        found.append("a" in service.stored)
        if len(found) == 1:
            with ThreadPoolExecutor(1) as other:
                other.submit(service.request, "a").result()
        return found[-1]

    hit, claim = service.flights.find_or_claim(find, lambda hit: Missing() if hit else Missing(["a"], ["a"]))
    assert (found, hit, claim.keys) == ([False, True], True, frozenset())


@pytest.mark.parametrize("seed", range(3))
def test_random_requests(pool: ThreadPoolExecutor, seed: int) -> None:
    """Overlapping sets of keys, failures and evictions: all requests end, and nothing stays claimed."""
    draw, service = random.Random(seed), Service()

    def request(keys: list[str], what: str) -> None:
        if what == "evicts":
            service.stored.difference_update(keys)
        with contextlib.suppress(ValueError), service.claimed(*keys)[1] as claim:
            if what == "fails":
                raise ValueError
            service.stored |= claim.keys
            claim.end(claim.keys)

    kinds = ["computes", "computes", "fails", "evicts"]
    work = [(draw.sample("abcdef", draw.randint(1, 4)), draw.choice(kinds)) for _ in range(400)]
    done = [pool.submit(request, *one) for one in work]
    assert not wait(done, FOR_EVER_S).not_done
    assert all(one.exception() is None for one in done)
    assert not service.flights._claims


def test_pace() -> None:
    pace = Pace()
    assert pace.seconds(10) is None
    pace.add(10, 1.0)
    assert pace.seconds(20) == pytest.approx(2.0)
    pace.add(10, 2.0)
    assert pace.seconds(10) == pytest.approx(1.3)
    assert Missing(["a"], (), None).patience_s == in_flight.UNKNOWN_PATIENCE_S
    assert Missing(["a"], (), 2 * FOR_EVER_S).patience_s == 4 * FOR_EVER_S
