"""The store ``mooncake://``."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from vlcache_fx.errors import StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Store, StoreStats
from vlcache_fx.store.entry import Entry, Json
from vlcache_fx.store.mooncake import admin, values
from vlcache_fx.store.mooncake.client import MooncakeClient
from vlcache_fx.store.mooncake.link import FIRST_REST_S, MooncakeLink
from vlcache_fx.store.mooncake.manifest import Manifest, key_of, patterns_of
from vlcache_fx.store.mooncake.settings import MooncakeSettings, default_secret_file
from vlcache_fx.store.mooncake.transfer import Outcome, Transfer, room_of
from vlcache_fx.store.mooncake.written import Written
from vlcache_fx.store.secret import load_secret
from vlcache_fx.store.tally import Tally
from vlcache_fx.store.url import StoreURL

log = logging.getLogger("vlcache_fx")


def open_mooncake_store(url: StoreURL, capacity_bytes: int) -> Store:
    """Open ``mooncake://host:port?name=value&...``; see ``MooncakeSettings`` for the parameters.

    Raises:
        OptionError: the URL is not valid.
        StoreError: nothing answers there, Mooncake is not installed, or the secret is wrong.
    """
    return MooncakeStore(MooncakeSettings.from_url(url), url.capacity_bytes or capacity_bytes)


class MooncakeStore(Store):
    """Entries in a Mooncake Store, shared with all processes and machines that have the same secret.

    How much the Mooncake Store holds is set where its storage is started; it evicts by itself. The bound here
    is on what this process writes: beyond it, the entries are removed that it has not used for longest.
    ``stats()``, ``len()`` count what this process wrote and believes stored, and so does ``entries()``
    unless ``admin_port`` is set.

    Refined donors. Values of a Mooncake Store are put once, and a donor becomes the mean of more and more
    contexts. Each is stored under a name with its number of contexts; ``get`` takes the largest, ``put``
    removes the smaller ones if nobody reads them, else they age out. A ``put`` of fewer contexts than are
    stored changes nothing, unless the tensors have other names or shapes: then it replaces what is there.
    Two processes may refine at once: one of the two means is found, never a mixture (see ``manifest``).

    Everything read is authenticated before a byte is used. Values of others, of another secret, under another
    name, or with changed bytes are misses, logged once and removed.

    A failure of a read is a miss, that of a write a ``StoreError``. After it the tier rests, and a new
    client is made in the background (``MooncakeLink``).

    Args:
        settings: address, limits of time, and more.
        capacity_bytes: bound on the bytes of what this process writes, positive.
        first_rest_s: how long the tier rests after a first failure, in seconds.

    Raises:
        StoreError: nothing answers there, Mooncake is not installed, or the secret is wrong.
    """

    tier: ClassVar[str] = "mooncake"

    def __init__(
        self, settings: MooncakeSettings, capacity_bytes: int, *, first_rest_s: float = FIRST_REST_S
    ) -> None:
        if capacity_bytes <= 0:
            raise StoreError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self._settings = settings
        self._secret = _load_secret(settings)
        self._timeout_s, self._transfer_s = settings.timeout_ms / 1000, settings.transfer_ms / 1000
        self._written = Written(capacity_bytes)
        self._tally = Tally()
        self._closed = False
        self._name = f"mooncake://{settings.address}"
        secret = self._secret  # the link must not keep the store alive
        self._link = MooncakeLink(lambda: _connect(settings, secret), self._name, first_rest_s)
        # Also at exit of the interpreter, where nobody closed the store.
        self._finalizer = weakref.finalize(self, self._link.close)

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``; waits at most ``timeout_ms``.

        The tensors arrive within ``transfer_ms``, or waiting for them raises ``DamagedEntryError``.
        """
        self._check_open()
        entry = None
        with self._using() as client:
            if client is not None:
                entry = self._get(client, key)
        self._tally.count("misses" if entry is None else "hits")
        return entry

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``; waits at most ``timeout_ms + transfer_ms``.

        Raises:
            StoreError: the Mooncake Store is full, rests, or failed.
        """
        self._check_open()
        nbytes = room_of(values.draft_of(entry, key))
        if entry.nbytes > self._written.capacity_bytes or nbytes > self._settings.buffer_bytes:
            self._tally.count("rejections")
            return False
        entry.wait()  # of another slow tier
        client = self._link.client()
        if client is None:
            raise StoreError(f"{self._name} rests after a failure")
        try:
            done = self._put(client, key, entry)
        except StoreError as error:
            self._failed(client, str(error))
            raise
        self._link.succeeded()
        if not done:
            self._tally.count("failures")
            raise StoreError(f"{self._name} is full")
        self._tally.count("admissions")
        return True

    def __contains__(self, key: object) -> bool:
        self._check_open()
        with self._using() as client:
            if client is not None and isinstance(key, str):
                return bool(values.ranks_of(client, key, time.monotonic() + self._timeout_s))
        return False

    def __len__(self) -> int:
        self._check_open()
        return len(self._written)

    def clear(self, selection: Selection | None = None) -> int:
        """See ``Store.clear``: drops the selected entries of all processes.

        Raises:
            StoreError: the Mooncake Store rests, or failed.
        """
        self._check_open()
        client = self._link.client()
        if client is None:
            raise StoreError(f"{self._name} rests after a failure")
        removed = []
        try:
            for pattern in patterns_of(selection):
                removed += client.call("remove_matching", self._transfer_s, pattern=pattern)
                if removed[-1] < 0:
                    raise client.failure(f"Mooncake returned {removed[-1]}")
        except StoreError as error:
            self._failed(client, str(error))
            raise
        self._written.clear(selection)
        self._tally.count("removals", removed[0])
        return removed[0]

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``. With ``admin_port``, those of all processes.

        ``used_at`` is 0 for entries of others.

        Raises:
            StoreError: the master's HTTP server does not answer.
        """
        self._check_open()
        host, port = self._settings.host, self._settings.admin_port
        own = {info.key: info.used_at for info in self._written.entries(self.tier)}
        if port is None:
            yield from self._written.entries(self.tier)
            return
        named = filter(None, map(key_of, admin.names_of(host, port)))
        for key in sorted({key for key, _ in named}, key=lambda key: own.get(key, 0.0)):
            manifest = None
            with self._using() as client:
                if client is not None:
                    deadline = time.monotonic() + self._timeout_s
                    manifest, _ = values.find(client, key, self._secret, deadline)
            if manifest is not None:
                yield EntryInfo(key, self.tier, manifest.nbytes, own.get(key, 0.0), manifest.info)

    def info_of(self, key: str) -> Mapping[str, Json] | None:
        """See ``Store.info_of``."""
        self._check_open()
        with self._using() as client:
            if client is None:
                return None
            deadline = time.monotonic() + self._timeout_s
            manifest, damaged = values.find(client, key, self._secret, deadline)
            self._tally.count("damaged", int(damaged))
            return None if manifest is None else manifest.info

    def close(self) -> None:
        """See ``Store.close``. The entries stay in the Mooncake Store, for others."""
        self._closed = True
        self._written.clear(None)
        self._finalizer()

    def stats(self) -> StoreStats:
        """See ``Store.stats``; works on a closed store."""
        counts: dict[str, Any] = self._tally.counts()
        written = self._written
        return StoreStats(len(written), written.used_bytes, written.capacity_bytes, tier=self.tier, **counts)

    def _get(self, client: MooncakeClient, key: str) -> Entry | None:
        manifest, damaged = values.find(client, key, self._secret, time.monotonic() + self._timeout_s)
        self._tally.count("damaged", int(damaged))
        if manifest is None:
            return None
        region = client.arena.allocate(room_of(manifest))
        if region is None:
            log.debug("vlcache: no room for %d bytes to arrive in: a miss", manifest.nbytes)
            return None
        transfer = Transfer(
            client,
            region,
            manifest,
            self._secret,
            time.monotonic() + self._transfer_s,
            lambda outcome: self._ended(client, manifest, outcome),
        )
        self._written.touch(key)
        return transfer.entry(self.tier)

    def _put(self, client: MooncakeClient, key: str, entry: Entry) -> bool:
        deadline = time.monotonic() + self._timeout_s + self._transfer_s
        found, damaged = values.find(client, key, self._secret, time.monotonic() + self._timeout_s)
        self._tally.count("damaged", int(damaged))
        draft = values.draft_of(entry, key)
        if found is not None and found.rank > draft.rank and found.has_layout_of(draft):
            return True  # a better one is there
        region = client.arena.allocate(room_of(draft))
        if region is None:
            return False
        manifest = values.described(entry, draft, self._secret, region)
        if found is not None and found.has_content_of(manifest):
            return True
        evicted = self._written.make_room(manifest.nbytes, key)
        self._tally.count("evictions", len(evicted))
        for old in evicted:
            values.remove_entry(client, old, self._secret, deadline, force=False)
        if not values.write(client, manifest, region, self._secret, deadline, replaces=found):
            return False
        self._written.add(manifest)
        return True

    def _ended(self, client: MooncakeClient, manifest: Manifest, outcome: Outcome) -> None:
        """Take note of a transfer; in its thread."""
        if outcome.client_failed:
            self._failed(client, outcome.reason)
        if outcome.damaged:
            self._tally.count("damaged")
            log.warning(
                "vlcache: entry %r of the Mooncake Store counts as a miss, and is removed: %s",
                manifest.key,
                outcome.reason,
            )
        if outcome.damaged or outcome.gone:
            self._written.drop(manifest.key)
            try:
                values.remove_entry(client, manifest, self._secret, time.monotonic() + self._timeout_s)
            except StoreError as error:
                self._failed(client, str(error))

    @contextmanager
    def _using(self) -> Iterator[MooncakeClient | None]:
        """Lend the client, None while the tier rests. A failure of the body ends the client."""
        client = self._link.client()
        try:
            yield client
        except StoreError as error:
            if client is None:
                raise
            self._failed(client, str(error))
        else:
            if client is not None:
                self._link.succeeded()

    def _failed(self, client: MooncakeClient, reason: str) -> None:
        if not self._closed:
            self._tally.count("failures")
            self._link.failed(client, reason)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")


def _connect(settings: MooncakeSettings, secret: bytes) -> MooncakeClient:
    client = MooncakeClient(settings)
    try:
        values.check_secret(client, secret, time.monotonic() + settings.transfer_ms / 1000)
    except StoreError as error:
        client.close()
        raise StoreError(f"mooncake://{settings.address}: {error}") from error
    return client


def _load_secret(settings: MooncakeSettings) -> bytes:
    path = settings.secret_file or default_secret_file()
    if settings.secret_file is None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the folder of the secret {path}: {error.strerror}") from error
    return load_secret(path)
