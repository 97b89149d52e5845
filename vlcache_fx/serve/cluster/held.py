"""Which pictures a replica has in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from vlcache_fx.errors import StoreError
from vlcache_fx.store.base import Store

MAX_REPORTED = 1024
"""Pictures that a replica names to the routers, those that were asked for last."""


class HeldPictures:
    """The pictures of recent requests, and the keys of their donors."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def add(self, pictures: Sequence[str], keys: Sequence[str]) -> None:
        """A request with these pictures was answered with the donors under these keys.

        With one key per picture, each picture has its own. Otherwise, as where a picture has several spans,
        each has all of them.
        """
        if not keys:
            return
        own = len(keys) == len(pictures)
        for index, picture in enumerate(pictures):
            self._keys[picture] = (keys[index],) if own else tuple(keys)
            self._keys.move_to_end(picture)
        while len(self._keys) > MAX_REPORTED:
            self._keys.popitem(last=False)

    def in_memory(self, stores: Iterable[Store]) -> list[str]:
        """The pictures all of whose donors are in the fastest tier of one of the stores, the latest last."""
        fastest = [store.fastest for store in stores]
        return [
            picture
            for picture, keys in self._keys.items()
            if any(all(_has(store, key) for key in keys) for store in fastest)
        ]


def _has(store: Store, key: str) -> bool:
    try:
        return key in store
    except StoreError:
        return False
