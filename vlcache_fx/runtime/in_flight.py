"""Requests for one new item compute it once: a request that misses a key waits for another that computes it.

A request looks its keys up, then claims those that it will compute and store. If another request has claimed
one, it waits, looks up again, and finds the entry. It waits no longer than computing would take (see
``patience_s``), and computes itself if the other failed or its entry was not stored.

No deadlock: a request never waits while it, or what started it, has a claim. So requests with claims never
wait, and claims end with the ``with`` statement that holds them.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

LEAST_PATIENCE_S = 0.5
"""Shortest time that a request may wait. Estimates of less are noise on a busy machine."""

UNKNOWN_PATIENCE_S = 60.0
"""Time that a request may wait without an estimate: the first computation may include a compilation."""

MAX_STORED = 4096
"""Keys whose storage is remembered, for requests that looked them up just before."""

# Whether a claim is open in this context or in one that started it (``asyncio.to_thread`` copies contexts).
_has_claim: ContextVar[bool] = ContextVar("vlcache_has_claim", default=False)


@dataclass(frozen=True)
class Missing:
    """The keys that a request looked up in vain.

    Attributes:
        keys: those whose entries it could use.
        computed: those of them that it will compute and store, unless it waits.
        expected_s: how long computing them will take; None if unknown.
    """

    keys: Collection[str] = ()
    computed: Collection[str] = ()
    expected_s: float | None = None

    @property
    def patience_s(self) -> float:
        """How long the request may wait: what computing takes beside another that computes the same."""
        expected_s = self.expected_s
        return UNKNOWN_PATIENCE_S if expected_s is None else max(2 * expected_s, LEAST_PATIENCE_S)


@dataclass(eq=False)
class Claim:
    """The keys that a request computes; others wait for them until it ends. A context manager.

    Attributes:
        keys: the keys.
        expected_end_s: when it is expected to end, on ``time.monotonic``; infinite if unknown.
        waited_s: how long the request waited before.
        was_refused: its entries were computed, but not all were stored: to wait for others is no use.
        thread: identifier of its thread, which cannot wait for it.
    """

    keys: frozenset[str] = frozenset()
    expected_end_s: float = math.inf
    waited_s: float = 0.0
    was_refused: bool = False
    thread: int = field(default_factory=threading.get_ident)
    _end: Callable[[Claim, Collection[str] | None], None] | None = field(default=None, repr=False)
    _before: Token[bool] | None = field(default=None, repr=False)

    def end(self, stored: Collection[str] | None = None) -> None:
        """Let the others go on. Does nothing the second time.

        Args:
            stored: keys that are now stored; None if computing failed: one of those that wait then computes.
        """
        end, self._end = self._end, None
        if end is not None:
            end(self, stored)

    def __enter__(self) -> Claim:
        self._before = _has_claim.set(_has_claim.get() or bool(self.keys))
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            _has_claim.reset(self._before)
        self.end()


@dataclass(frozen=True)
class _Outcome:
    """How a wait ended.

    Attributes:
        stored: wanted keys that were stored since the lookup.
        is_last: it is no use to wait again.
        waited_s: how long it took; 0 without a wait.
    """

    stored: set[str]
    is_last: bool
    waited_s: float


class InFlight:
    """The keys that requests of an engine compute at present. Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Weak: a claim whose request was interrupted before it entered it ends.
        self._claims: WeakValueDictionary[str, Claim] = WeakValueDictionary()
        self._stored: OrderedDict[str, int] = OrderedDict()  # key -> number of the claim's end
        self._ends = 0

    def find_or_claim(
        self,
        find: Callable[[T | None], T],
        missing: Callable[[T], Missing],
        *,
        may_wait: bool = True,
    ) -> tuple[T, Claim]:
        """Look keys up, wait for those that other requests compute, and claim the rest.

        Args:
            find: looks up; takes what it found before, None at first.
            missing: returns what is missing in what ``find`` found.
            may_wait: False if the thread holds a lock that other requests need.

        Returns:
            What ``find`` found last, and the claim, which the caller must enter at once.
        """
        may_wait = may_wait and not _has_claim.get()
        found, stored, deadline_s, waited_s = None, set[str](), math.inf, 0.0
        while True:
            with self._changed:
                before = self._ends
            found = find(found)
            wanted = missing(found)
            if not wanted.keys:
                return found, Claim(waited_s=waited_s)
            if stored.intersection(wanted.keys):
                may_wait = False  # it was stored, and is gone or does not fit: another would not help
            with self._changed:
                now_s = time.monotonic()
                deadline_s = min(deadline_s, now_s + wanted.patience_s)
                outcome = self._wait(wanted, before, deadline_s if may_wait else now_s)
                stored, may_wait = outcome.stored, may_wait and not outcome.is_last
                waited_s += outcome.waited_s
                if not stored:
                    return found, self._claim(wanted, waited_s)

    def _wait(self, wanted: Missing, before: int, deadline_s: float) -> _Outcome:
        """Wait until no other request computes a wanted key, or until waiting is no use.

        The caller has the lock, and looked the keys up after claim number ``before`` ended.
        """
        awaited, waited_s = set[Claim](), 0.0
        while True:
            stored = {key for key in wanted.keys if self._stored.get(key, 0) > before}
            claims = {claim for key in wanted.keys if (claim := self._claims.get(key)) is not None}
            claims = {claim for claim in claims if claim.thread != threading.get_ident()}
            awaited |= claims
            now_s = time.monotonic()
            is_late = any(deadline_s < claim.expected_end_s < math.inf for claim in awaited)
            was_refused = any(claim.was_refused for claim in awaited)
            if now_s >= deadline_s or is_late or was_refused or not claims:
                return _Outcome(stored, bool(claims) or was_refused, waited_s)
            self._changed.wait(deadline_s - now_s)
            waited_s += time.monotonic() - now_s

    def _claim(self, wanted: Missing, waited_s: float) -> Claim:
        """Claim the keys that the request computes and no other request has. The caller has the lock."""
        keys = frozenset(key for key in wanted.computed if key not in self._claims)
        if not keys:
            return Claim(waited_s=waited_s)
        expected_s = math.inf if wanted.expected_s is None else wanted.expected_s
        claim = Claim(keys, time.monotonic() + expected_s, waited_s, _end=self._end)
        self._claims.update(dict.fromkeys(keys, claim))
        return claim

    def _end(self, claim: Claim, stored: Collection[str] | None) -> None:
        with self._changed:
            claim.was_refused = stored is not None and not claim.keys.issubset(stored)
            self._ends += 1
            for key in claim.keys:
                self._claims.pop(key, None)
            for key in claim.keys.intersection(stored or ()):
                self._stored[key] = self._ends
                self._stored.move_to_end(key)
            while len(self._stored) > MAX_STORED:
                self._stored.popitem(last=False)
            self._changed.notify_all()
