"""What an engine remembers of keys and weights, bounded."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from vlcache_fx.keys.weights import WeightsFingerprint

KEYS = 4096
WEIGHT_SETS = 16


class RecentKeys:
    """The keys that were added last, at most ``KEYS`` of them. Safe to share between threads."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: str) -> bool:
        """Remember a key; True where it was there already."""
        with self._lock:
            known = key in self._keys
            self._keys[key] = None
            self._keys.move_to_end(key)
            while len(self._keys) > KEYS:
                self._keys.popitem(last=False)
            return known

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._keys.clear()


class RecentContents:
    """Under which weights contents were seen last, and keys; at most ``KEYS`` of them. Safe in threads."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: str, weights: str) -> tuple[str, ...]:
        """Remember a content with the weights that it is seen with; returns those known before."""
        with self._lock:
            known = self._seen.get(content, ())
            self._seen[content] = (*(one for one in known if one != weights), weights)[-WEIGHT_SETS:]
            self._seen.move_to_end(content)
            while len(self._seen) > KEYS:
                self._seen.popitem(last=False)
            return known

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._seen.clear()


class Fingerprints:
    """Fingerprints of weights, shared by graphs of the same tensors. Safe to share between threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], WeightsFingerprint] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tensors: Sequence[Tensor]) -> str:
        """Fingerprint of these weights now."""
        key = tuple(id(tensor) for tensor in tensors)
        with self._lock:
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = WeightsFingerprint(tensors)
                while len(self._known) > WEIGHT_SETS:
                    self._known.popitem(last=False)
            return known.current(tensors)
