"""Bounded records of recent keys, lookups and fingerprints of an engine."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.keys.weights import WeightsFingerprint

MAX_KEYS = 4096
MAX_WEIGHT_SETS = 16
MAX_SAME_SUBJECT = 16
"""Keys of one content that are found; of more, the latest."""

SUBJECTS = ("content", "encoder.content")
"""Parts that say which item a key is about: its features, and its pixels."""


class RecentKeys:
    """The last ``max_keys`` keys that were added. Safe to share between threads."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: str) -> bool:
        """Add a key; return True if it was present."""
        with self._lock:
            is_present = key in self._keys
            self._keys[key] = None
            self._keys.move_to_end(key)
            while len(self._keys) > self._max_keys:
                self._keys.popitem(last=False)
            return is_present

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def copy(self) -> "RecentKeys":
        """Return a copy that changes on its own."""
        copied = RecentKeys(self._max_keys)
        with self._lock:
            copied._keys = self._keys.copy()
        return copied

    def clear(self, selection: Selection | None = None) -> None:
        """Remove the selected keys, by default all."""
        with self._lock:
            for key in [key for key in self._keys if selection is None or selection.matches(key)]:
                del self._keys[key]


class ReturnCounts:
    """How often each recent item was computed exactly when it returned. Safe to share between threads."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: str) -> int:
        """Return the count of a key."""
        return self._counts.get(key, 0)

    def add(self, key: str) -> None:
        """Count a return."""
        with self._lock:
            self._counts[key] = self._counts.pop(key, 0) + 1
            while len(self._counts) > MAX_KEYS:
                self._counts.popitem(last=False)

    def copy(self) -> "ReturnCounts":
        """Return a copy that changes on its own."""
        copied = ReturnCounts()
        with self._lock:
            copied._counts = self._counts.copy()
        return copied

    def clear(self, selection: Selection | None = None) -> None:
        """Forget the selected keys, by default all."""
        with self._lock:
            for key in [key for key in self._counts if selection is None or selection.matches(key)]:
                del self._counts[key]


@dataclass(frozen=True)
class Lookup:
    """A key that was looked up.

    Attributes:
        number: the order of first lookups.
        key: the key.
        parts: what it covers, and the notes of its media span, by name.
    """

    number: int
    key: str
    parts: Mapping[str, str]


class RecentLookups:
    """The last ``MAX_KEYS`` keys that were looked up, found by content. Safe to share between threads."""

    def __init__(self) -> None:
        self._lookups: OrderedDict[str, Lookup] = OrderedDict()
        self._by_subject: dict[str, tuple[str, ...]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def add(self, key: str, parts: Mapping[str, str]) -> tuple[Lookup, bool]:
        """Add a key; return its lookup, and True if it was present."""
        with self._lock:
            earlier = self._lookups.get(key)
            if earlier is not None:
                self._lookups.move_to_end(key)
                return earlier, True
            lookup = self._lookups[key] = Lookup(next(self._numbers), key, dict(parts))
            for subject in _subjects(lookup):
                self._by_subject[subject] = (*self._by_subject.get(subject, ()), key)[-MAX_SAME_SUBJECT:]
            while len(self._lookups) > MAX_KEYS:
                self._forget(self._lookups.popitem(last=False)[1])
            return lookup, False

    def get(self, key: str) -> Lookup | None:
        """Return the lookup of a key; None if it is unknown."""
        return self._lookups.get(key)

    def related(self, lookup: Lookup) -> list[Lookup]:
        """Return earlier lookups of other keys with the same features or the same pixels."""
        with self._lock:
            keys = [key for subject in _subjects(lookup) for key in self._by_subject.get(subject, ())]
            found = [self._lookups[key] for key in dict.fromkeys(keys)]
        return [other for other in found if other.number < lookup.number]

    def before(self, number: int) -> list[Lookup]:
        """Return the lookups before a number, earliest first."""
        with self._lock:
            return [lookup for lookup in self._lookups.values() if lookup.number < number]

    def copy(self) -> "RecentLookups":
        """Return a copy that changes on its own."""
        copied = RecentLookups()
        with self._lock:
            copied._lookups, copied._by_subject = self._lookups.copy(), self._by_subject.copy()
            last = max((lookup.number for lookup in self._lookups.values()), default=-1)
        copied._numbers = itertools.count(last + 1)
        return copied

    def clear(self, selection: Selection | None = None) -> None:
        """Remove the contents whose keys are selected, by default all."""
        with self._lock:
            for key in [key for key in self._lookups if selection is None or selection.matches(key)]:
                self._forget(self._lookups.pop(key))

    def _forget(self, lookup: Lookup) -> None:
        for subject in _subjects(lookup):
            left = tuple(key for key in self._by_subject.get(subject, ()) if key != lookup.key)
            if left:
                self._by_subject[subject] = left
            else:
                self._by_subject.pop(subject, None)


def _subjects(lookup: Lookup) -> set[str]:
    """The digests by which a lookup is found: those of its features and of its pixels."""
    return {lookup.parts[name] for name in SUBJECTS if name in lookup.parts}


class Fingerprints:
    """Fingerprints of weights, shared by graphs with the same tensors. Safe to share between threads."""

    def __init__(self) -> None:
        self._fingerprints: OrderedDict[tuple[int, ...], WeightsFingerprint] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tensors: Sequence[Tensor]) -> str:
        """Return the current fingerprint of weights."""
        key = tuple(id(tensor) for tensor in tensors)
        with self._lock:
            fingerprint = self._fingerprints.get(key)
            if fingerprint is None:
                fingerprint = self._fingerprints[key] = WeightsFingerprint(tensors)
                while len(self._fingerprints) > MAX_WEIGHT_SETS:
                    self._fingerprints.popitem(last=False)
            return fingerprint.current(tensors)
