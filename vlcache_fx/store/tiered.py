"""Several stores as one: a fast one first, slower and larger ones below it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from vlcache_fx.errors import StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Eviction, Store, StoreStats
from vlcache_fx.store.entry import Entry, contexts_in
from vlcache_fx.store.recheck import Recheck
from vlcache_fx.store.tier_health import TierHealth
from vlcache_fx.store.write_queue import Job, Kind, WriteQueue

MIB = 1 << 20


class TieredStore(Store):
    """A list of stores, fastest first. Requests never wait for a write to a slow one.

    ``put`` stores in the first tier, if that is in memory, and queues a write to all others. ``get`` asks the
    first tier, the queue, and the other tiers in order; what a lower tier has is copied to those above it in
    the background. What a tier in memory evicts is written to the lower ones that lack it. What the queue
    cannot take is dropped and counted. A tier that fails costs what it has, never the request: each kind of
    failure is logged once.

    Other processes may refine a donor that is in memory here. A donor that is read is looked up again in the
    other tiers, in the background and every ``recheck.RECHECK_S`` seconds; one of more contexts replaces it.

    Args:
        tiers: the stores, which this one owns: ``close`` closes them.
        queue_bytes: bound on the bytes that wait to be written; a larger entry is taken while none waits.
        queue_entries: bound on their number.
        close_timeout_s: seconds that ``close``, or the interpreter's exit, waits for queued writes. ``clear``
            waits as long for the write in progress.

    Raises:
        StoreError: there is no tier, or one is given twice.
    """

    def __init__(
        self,
        tiers: Sequence[Store],
        *,
        queue_bytes: int = 256 * MIB,
        queue_entries: int = 4096,
        close_timeout_s: float = 10.0,
    ) -> None:
        if not tiers or len({id(tier) for tier in tiers}) < len(tiers):
            raise StoreError("a tiered store needs one or more tiers, each given once")
        self._tiers = tuple(tiers)
        self._first = tiers[0] if tiers[0].is_memory else None
        self._below = range(0 if self._first is None else 1, len(tiers))  # written in the background
        self._health = TierHealth(tiers)
        self._queue = WriteQueue(queue_bytes, queue_entries, close_timeout_s)
        self._close_timeout_s = close_timeout_s
        self._lock = threading.Lock()
        self._shared = [index for index in self._below if not tiers[index].is_memory]  # others write to them
        self._recheck = Recheck()
        self._unwritten: set[str] = set()  # in the first tier; the queue did not take their latest value
        self._this = threading.local()  # .generation: that of the put or job in progress in this thread
        self._closed = False
        self._stops = [tier.on_evict(_listener(self, index)) for index, tier in enumerate(tiers[:-1])]

    @property
    def fastest(self) -> Store:
        """The first tier."""
        return self._tiers[0]

    @property
    def tier(self) -> str:  # type: ignore[override]
        """Name of the first tier."""
        return self._tiers[0].tier

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``; reads of a slow tier have its own time bounds."""
        self._check_open()
        entry = self._get(key)
        self._health.count("misses" if entry is None else "hits")
        return entry

    def _get(self, key: str) -> Entry | None:
        if self._first is not None:
            with self._health.tolerating(0, "read"):
                entry = self._first.get(key)
                if entry is not None:
                    if self._shared and self._recheck.is_due(key, entry):
                        self._look_for_better(key, entry)
                    return entry
        generation = self._queue.generation
        queued = self._queue.find(key)
        if queued is not None or self._queue.is_cancelled(key):
            return queued if queued is None or self._first else _named("memory", queued)
        for index in self._below:
            with self._health.tolerating(index, "read"):
                entry = self._tiers[index].get(key)
                if entry is not None:
                    above = self._fitting(range(index), entry.nbytes)
                    if above:
                        self._offer(Kind.PROMOTION, key, entry, above, generation)
                    return _named(self._tiers[index].tier, entry)
        return None

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``; waits for the first tier alone, and only if that is in memory."""
        self._check_open()
        generation = self._queue.generation
        targets = self._fitting(self._below, entry.nbytes)
        # Queued before it is stored: a promotion of an older value is void then.
        is_queued = self._offer(Kind.PUT, key, entry, targets, generation)
        is_stored = False
        if self._first is not None:
            with self._health.tolerating(0, "write"), self._as_of(generation):
                is_stored = self._first.put(key, entry)
        with self._lock:
            if targets and is_stored and not is_queued:
                self._unwritten.add(key)
            else:
                self._unwritten.discard(key)
        self._health.count("admissions" if is_stored or is_queued else "rejections")
        return is_stored or bool(targets)

    def _fitting(self, indices: range, nbytes: int) -> list[int]:
        return [index for index in indices if nbytes <= self._health.capacities[index]]

    def _offer(self, kind: Kind, key: str, entry: Entry, targets: list[int], generation: int) -> bool:
        prepare = None if kind is Kind.PROMOTION else _recorded(entry)
        job = Job(kind, key, entry, targets, generation, self._run, prepare)
        return self._queue.offer(job) and bool(targets)

    def _look_for_better(self, key: str, entry: Entry) -> None:
        """Queue a search for a donor of more contexts; the job holds no tensors."""
        bare, generation = Entry({}, entry.info), self._queue.generation
        self._queue.offer(Job(Kind.PROMOTION, key, bare, [0], generation, self._replace_by_better))

    def _replace_by_better(self, job: Job) -> None:
        """Do such a job, in the thread of the queue."""
        first, contexts = self._tiers[0], contexts_in(job.entry.info)
        for index in self._shared:
            tier = self._tiers[index]
            with self._health.tolerating(index, "read", everything=True):
                info = tier.info_of(job.key)
                better = tier.get(job.key) if info is not None and contexts_in(info) > contexts else None
                if better is None:
                    continue
                better.wait()
                better = better.materialized()
                with self._queue.unless_cancelled(job) as is_wanted, self._as_of(job.generation):
                    if is_wanted and first.put(job.key, better):
                        self._health.count("promotions", 0)
                return

    def _write_down(self, index: int, key: str, entry: Entry) -> None:
        """Queue what a tier evicted; whether lower tiers have it is found out in the background."""
        targets = self._fitting(range(index + 1, len(self._tiers)), entry.nbytes)
        with self._lock:
            is_newer = index == 0 and key in self._unwritten
            if is_newer:
                self._unwritten.remove(key)
        if targets and not self._closed:
            generation = getattr(self._this, "generation", None)
            generation = self._queue.generation if generation is None else generation
            self._offer(Kind.PUT if is_newer else Kind.EVICTION, key, entry, targets, generation)

    @contextmanager
    def _as_of(self, generation: int) -> Iterator[None]:
        """In the body, evictions in this thread are as old as ``generation``: a later clear covers them."""
        self._this.generation = generation
        try:
            yield
        finally:
            self._this.generation = None

    def _run(self, job: Job) -> None:
        """Do a job, in the thread of the queue. Every failure costs one tier's copy."""
        written = []
        for index in job.targets:
            tier, is_promotion = self._tiers[index], job.kind is Kind.PROMOTION
            with self._health.tolerating(index, "write", everything=True), self._as_of(job.generation):
                if job.is_cancelled or (job.kind is not Kind.PUT and job.key in tier):
                    continue
                if job.prepare is not None:
                    job.prepare()
                job.entry.wait()
                job.entry = job.entry.materialized()
                if is_promotion and tier.is_memory:
                    with self._queue.unless_cancelled(job) as is_wanted:  # it would replace a newer value
                        is_stored = is_wanted and tier.put(job.key, job.entry)
                else:
                    written.append(index)
                    is_stored = tier.put(job.key, job.entry)
                if is_stored:
                    self._health.count("promotions" if is_promotion else "write_downs", index)
        if job.is_cancelled:
            for index in written:
                with self._health.tolerating(index, "clear", everything=True):
                    self._tiers[index].clear(Selection(key=job.key))

    def __contains__(self, key: object) -> bool:
        """See ``Store``; tiers behind a network are not asked."""
        self._check_open()
        if self._first is not None:
            with self._health.tolerating(0, "read"):
                if key in self._first:
                    return True
        if isinstance(key, str):
            if self._queue.find(key) is not None:
                return True
            if self._queue.is_cancelled(key):
                return False
        for index in self._below:
            with self._health.tolerating(index, "read"):
                if self._tiers[index].is_local and key in self._tiers[index]:
                    return True
        return False

    def __len__(self) -> int:
        """Return the number of distinct keys. Lists all tiers."""
        return sum(1 for _ in self.entries())

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``; each key once, with its fastest tier, and slow tiers at the front."""
        self._check_open()
        yield from self._entries(only_local=False)

    def _entries(self, *, only_local: bool) -> Iterator[EntryInfo]:
        seen: set[str] = set()
        listed: list[list[EntryInfo]] = []
        for index, tier in enumerate(self._tiers):
            with self._health.tolerating(index, "listing"):
                if tier.is_local or not only_local:
                    listed.append([info for info in tier.entries() if info.key not in seen])
                    seen |= {info.key for info in listed[-1]}
        for infos in reversed(listed):
            yield from infos
        for key, entry in self._queue.values().items():
            if key not in seen:
                yield EntryInfo(key, "memory", entry.nbytes, 0.0, entry.info)

    def clear(self, selection: Selection | None = None) -> int:
        """See ``Store.clear``; nothing that is queued or being written comes back.

        Raises:
            StoreError: a tier could not be cleared; the others are.
        """
        self._check_open()
        chosen = selection or Selection()
        listed = {info.key for info in self._entries(only_local=True)}
        dropped = len({key for key in listed if selection is None or chosen.matches(key)})
        self._queue.cancel(selection)
        with self._lock:
            self._unwritten = {key for key in self._unwritten if selection and not chosen.matches(key)}
        failed: list[Exception] = []
        for are_memory in (True, False):
            for tier in self._tiers:
                try:
                    dropped = max(dropped, tier.clear(selection) if tier.is_memory is are_memory else 0)
                except (StoreError, OSError) as error:
                    failed.append(error)
            if are_memory:
                # The write in progress is void. If it outlasts the wait, its thread undoes it.
                self._queue.wait_for_cancelled(self._close_timeout_s)
        if failed:
            raise StoreError(f"a tier could not be cleared: {failed[0]}") from failed[0]
        return dropped

    def evicted(self, key: str) -> Eviction | None:
        """See ``Store.evicted``: the latest of all tiers."""
        self._check_open()
        found = []
        for index, tier in enumerate(self._tiers):
            with self._health.tolerating(index, "read"):
                found.append(tier.evicted(key))
        return max(filter(None, found), key=lambda eviction: eviction.evicted_at, default=None)

    def flush(self, timeout_s: float | None = None) -> bool:
        """See ``Store.flush``."""
        is_done = self._queue.flush(timeout_s)
        for tier in self._tiers:
            is_done &= tier.flush(timeout_s)
        return is_done

    def close(self, timeout_s: float | None = None) -> None:
        """Write what is queued, for up to ``timeout_s`` seconds, then close the tiers.

        Args:
            timeout_s: by default ``close_timeout_s``.
        """
        with self._lock:
            was_closed, self._closed = self._closed, True
        if was_closed:
            return
        self._queue.close(self._close_timeout_s if timeout_s is None else timeout_s)
        self._health.close()
        for stop in self._stops:
            stop()
        for index, tier in enumerate(self._tiers):
            with self._health.tolerating(index, "close"):
                tier.close()

    def stats(self) -> StoreStats:
        """See ``Store.stats``. Sizes are sums: an entry in two tiers counts twice."""
        return self._health.stats(self._queue.drops)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")


def _listener(store: TieredStore, index: int) -> Callable[[str, Entry], None]:
    """Return the listener for a tier's evictions; a tier that lives longer does not keep the store alive."""
    reference = weakref.ref(store)

    def listener(key: str, entry: Entry) -> None:
        alive = reference()
        if alive is not None:
            alive._write_down(index, key, entry)

    return listener


def _named(tier: str, entry: Entry) -> Entry:
    """Return the entry with the name of its tier."""
    if entry.tier is not None:
        return entry
    return Entry(entry.tensors, entry.info, copy=False, tier=tier)


def _recorded(entry: Entry) -> Callable[[], None] | None:
    """Return a function that waits until the work that is queued on this thread's GPU streams is done."""
    events = []
    for device in {entry.peek(name).device for name in entry.tensors if entry.peek(name).is_cuda}:
        events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        events[-1].record(torch.cuda.current_stream(device))

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait if events else None
