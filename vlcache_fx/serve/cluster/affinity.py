"""Which replica gets a request: one that has its pictures, unless it is too busy.

Knows nothing of Ray: ``router.py`` feeds it, and asks it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from blake3 import blake3

MAX_PICTURES = 16384
"""Pictures that are remembered; those that were asked for longest ago are forgotten first."""


class Affinity:
    """Remembers which replicas have which pictures.

    Two sources: where requests were sent, known at once; and what replicas say, which comes seconds later and
    also knows what they dropped. A picture is taken for dropped if the replica did not name it a while after
    the last request with it was sent there.

    Args:
        imbalance: how many requests more than the least busy replica a chosen one may have.
        trust_s: how long a replica is believed to have what it was sent, without its word. Longer than its
            reports take.
        clock: seconds; for tests.
    """

    def __init__(self, imbalance: int, trust_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._imbalance, self._trust_s, self._clock = imbalance, trust_s, clock
        self._sent: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._reported: dict[str, frozenset[str]] = {}
        self._replicas: frozenset[str] = frozenset()

    def sent(self, pictures: Collection[str], replica: str) -> None:
        """A request with these pictures goes to a replica, which has them from now on."""
        now = self._clock()
        for picture in pictures:
            self._sent.setdefault(picture, {})[replica] = now
            self._sent.move_to_end(picture)
        while len(self._sent) > MAX_PICTURES:
            self._sent.popitem(last=False)

    def reported(self, replica: str, pictures: Collection[str]) -> None:
        """A replica says which pictures it has."""
        self._reported[replica] = frozenset(pictures)

    def retain(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        kept = frozenset(replicas)
        if kept == self._replicas:
            return
        self._replicas = kept
        self._reported = {name: found for name, found in self._reported.items() if name in kept}
        for picture, places in list(self._sent.items()):
            left = {name: at for name, at in places.items() if name in kept}
            if left:
                self._sent[picture] = left
            else:
                del self._sent[picture]

    def num_held(self, pictures: Sequence[str], replica: str) -> int:
        """How many of the pictures a replica has, as far as is known."""
        reported = self._reported.get(replica, frozenset())
        since = self._clock() - self._trust_s
        return sum(
            picture in reported or self._sent.get(picture, {}).get(replica, since - 1) >= since
            for picture in pictures
        )

    def rank(
        self, pictures: Sequence[str], queues: Mapping[str, int], avoid: Collection[str] = ()
    ) -> list[str]:
        """Return the replicas, best first.

        Best is the replica with most of the pictures, of those that are not too busy; of equal ones the least
        busy, and of these one that depends on the pictures alone, so that all routers agree on it.

        Args:
            pictures: digests of the request's pictures.
            queues: the replicas, and how many requests each has.
            avoid: replicas that come last.
        """
        if not queues:
            return []
        usable = [length for name, length in queues.items() if name not in avoid]
        bound = min(usable, default=0) + self._imbalance

        def badness(name: str) -> tuple[bool, bool, int, int, str]:
            is_busy = queues[name] > bound
            num_held = 0 if is_busy else self.num_held(pictures, name)
            return name in avoid, is_busy, -num_held, queues[name], _draw(pictures, name)

        return sorted(queues, key=badness)


def _draw(pictures: Sequence[str], replica: str) -> str:
    """Rendezvous hashing by the first picture: each prefers another replica, whatever others there are."""
    first = pictures[0] if pictures else ""
    return blake3(f"{first} {replica}".encode()).hexdigest(length=8)
