"""Bounded records of recent keys, contents and fingerprints of an engine."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.keys.weights import WeightsFingerprint

MAX_KEYS = 4096
MAX_WEIGHT_SETS = 16


class RecentKeys:
    """The last ``MAX_KEYS`` keys that were added. Safe to share between threads."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: str) -> bool:
        """Add a key; return True if it was present."""
        with self._lock:
            is_present = key in self._keys
            self._keys[key] = None
            self._keys.move_to_end(key)
            while len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)
            return is_present

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def clear(self, selection: Selection | None = None) -> None:
        """Remove the selected keys, by default all."""
        with self._lock:
            for key in [key for key in self._keys if selection is None or selection.matches(key)]:
                del self._keys[key]


class RecentContents:
    """The last ``MAX_KEYS`` contents, with the weights of their calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: str, weights: str) -> tuple[str, ...]:
        """Add a content with the weights of its call; return the weights of earlier calls."""
        with self._lock:
            earlier = self._seen.get(content, ())
            self._seen[content] = (*(other for other in earlier if other != weights), weights)[
                -MAX_WEIGHT_SETS:
            ]
            self._seen.move_to_end(content)
            while len(self._seen) > MAX_KEYS:
                self._seen.popitem(last=False)
            return earlier

    def clear(self, selection: Selection | None = None) -> None:
        """Remove the contents whose keys are selected, by default all."""
        with self._lock:
            for key in [key for key in self._seen if selection is None or selection.matches(key)]:
                del self._seen[key]


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
