"""When to ask shared tiers for a better donor than the one in memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from vlcache_fx.store.entry import Entry, contexts_in

RECHECK_S = 10.0
"""Seconds after which a donor that is read is looked up again in tiers that other processes write."""

REMEMBERED = 4096


class Recheck:
    """Remembers when each donor was looked up. Safe in threads.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def is_due(self, key: str, entry: Entry) -> bool:
        """Return whether to look up a donor now; if so, it is not due again for a while.

        A donor is due ``RECHECK_S`` after it was first read: another process needs time to make it better.
        """
        if not contexts_in(entry.info):
            return False
        now = self._clock()
        with self._lock:
            asked = self._asked.get(key)
            if asked is not None and now - asked < RECHECK_S:
                return False
            self._asked[key] = now
            self._asked.move_to_end(key)
            if len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
        return asked is not None
