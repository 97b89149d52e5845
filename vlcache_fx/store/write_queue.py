"""Work for slow tiers: a bounded queue and one thread, so that no request waits for a write."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.clears import Clears
from vlcache_fx.store.entry import Entry

IDLE_S = 5.0
"""Seconds without work after which the thread ends; the next job starts another."""

REMEMBERED_CLEARS = 16
"""Latest calls of ``clear`` with which late jobs are compared; jobs from before them are dropped."""


class Kind(IntEnum):
    """Why an entry is written. Of two jobs for a key, one of a higher kind holds the newer value."""

    PROMOTION = 0  # found in a lower tier
    EVICTION = 1  # dropped by a higher tier
    PUT = 2  # stored by a request


@dataclass(eq=False)
class Job:
    """An entry to be written.

    Attributes:
        kind: why.
        key: its key.
        entry: the entry.
        targets: indices of the tiers to which it is written.
        generation: ``WriteQueue.generation`` when the entry was known to be stored.
        run: does the work, in the thread; must not raise.
        prepare: waits until the entry's tensors can be read; None if they can.
        is_cancelled: a later ``clear`` or ``put`` made it void.
    """

    kind: Kind
    key: str
    entry: Entry
    targets: Sequence[int]
    generation: int
    run: Callable[[Job], None]
    prepare: Callable[[], None] | None = None
    is_cancelled: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.entry.nbytes


class WriteQueue:
    """One job per key, in the order of arrival; the latest value wins. Safe in threads and after a fork.

    A forked child starts with an empty queue: its parent does the work that was queued.

    Args:
        capacity_bytes: bound on the bytes of all jobs, the running one included. A job that is larger than
            all of this is taken only while there is no other.
        max_jobs: bound on their number.
        exit_timeout_s: seconds for which the interpreter's exit waits for jobs.
    """

    def __init__(self, capacity_bytes: int, max_jobs: int, exit_timeout_s: float) -> None:
        self._capacity, self._max_jobs, self._exit_timeout_s = capacity_bytes, max_jobs, exit_timeout_s
        self._here = self._new_state()

    def _new_state(self) -> _State:
        state = _State()
        # Runs when the queue is collected, or when the interpreter exits. The thread knows the state alone.
        self._at_exit = weakref.finalize(self, _finish, state, self._exit_timeout_s)
        return state

    @property
    def _state(self) -> _State:
        if self._here.pid != os.getpid():  # a fork copies neither threads nor a usable lock
            self._here = self._new_state()
        return self._here

    @property
    def generation(self) -> int:
        """Number of calls of ``cancel``."""
        return self._state.clears.number

    @property
    def drops(self) -> int:
        """Number of jobs that were not taken, or not done before ``close`` ended."""
        return self._state.drops

    @property
    def used_bytes(self) -> int:
        """Bytes of all jobs, the running one included."""
        return self._state.used_bytes

    def offer(self, job: Job) -> bool:
        """Queue a job; return False if it is dropped. Never waits for a job.

        A queued job of the same key is replaced, unless its value is newer. A running promotion of the key is
        cancelled by a put.
        """
        state = self._state
        with state.changed:
            running = state.running
            if running is not None and (running.key, running.kind) == (job.key, Kind.PROMOTION):
                running.is_cancelled |= job.kind is Kind.PUT
            if not job.targets or state.clears.covers(job.key, job.generation):
                return False
            queued = state.jobs.get(job.key)
            if queued is not None and queued.kind > job.kind:
                return True
            if state.is_closing or not self._has_room(job) or not state.start_thread():
                state.drops += 1
                return False
            if job.key in state.jobs:
                state.used_bytes -= state.jobs[job.key].nbytes
            state.jobs[job.key] = job
            state.used_bytes += job.nbytes
            state.changed.notify_all()
            return True

    def _has_room(self, job: Job) -> bool:
        """Return whether a job fits, after dropping promotions for one of another kind."""
        state = self._here
        promotions = [
            key for key, other in state.jobs.items() if other.kind is Kind.PROMOTION and key != job.key
        ]
        while True:
            replaced = state.jobs.get(job.key)
            others = state.used_bytes - (replaced.nbytes if replaced is not None else 0)
            is_full = len(state.jobs) >= self._max_jobs and replaced is None
            if not is_full and (others == 0 or others + job.nbytes <= self._capacity):
                return True
            if job.kind is Kind.PROMOTION or not promotions:
                return False
            state.used_bytes -= state.jobs.pop(promotions.pop(0)).nbytes
            state.drops += 1

    def find(self, key: str) -> Entry | None:
        """Return the latest value of a key that is still being written, or None."""
        state = self._state
        with state.changed:
            for job in (state.jobs.get(key), state.running):
                if job is not None and job.key == key and job.kind is not Kind.PROMOTION:
                    return None if job.is_cancelled else job.entry
            return None

    def values(self) -> dict[str, Entry]:
        """Return the values of all keys that ``find`` finds."""
        state = self._state
        with state.changed:
            jobs = [*([state.running] if state.running else []), *state.jobs.values()]  # the latest wins
            return {
                job.key: job.entry for job in jobs if job.kind is not Kind.PROMOTION and not job.is_cancelled
            }

    def is_cancelled(self, key: str) -> bool:
        """Return whether the running job is one of this key, and void: what it writes must not be read."""
        state = self._state
        with state.changed:
            running = state.running
            return running is not None and running.key == key and running.is_cancelled

    @contextmanager
    def unless_cancelled(self, job: Job) -> Iterator[bool]:
        """Yield whether a job is still valid; until the body ends, nothing makes it void."""
        with self._state.changed:
            yield not job.is_cancelled

    def cancel(self, selection: Selection | None) -> None:
        """Drop the selected jobs, and those that are offered late; the running one becomes void."""
        state = self._state
        with state.changed:
            state.clears.add(selection)
            for key in [key for key in state.jobs if selection is None or selection.matches(key)]:
                state.used_bytes -= state.jobs.pop(key).nbytes
            running = state.running
            if running is not None and (selection is None or selection.matches(running.key)):
                running.is_cancelled = True
            state.changed.notify_all()

    def wait_for_cancelled(self, timeout_s: float) -> bool:
        """Wait until no void job is running; return False after ``timeout_s`` seconds."""
        state = self._state
        with state.changed:
            return state.changed.wait_for(
                lambda: state.running is None or not state.running.is_cancelled, timeout_s
            )

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait for all jobs; return False if some are left after ``timeout_s`` seconds."""
        state = self._state
        with state.changed:
            return state.changed.wait_for(lambda: not state.jobs and state.running is None, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Take no more jobs, wait up to ``timeout_s`` seconds for those that are left, and end the thread.

        A job that still runs then ends in its own time, in a daemon thread.
        """
        _finish(self._state, timeout_s)
        self._at_exit.detach()


class _State:
    """What the thread knows. It has no reference to the queue, so that the queue can be collected."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Reentrant: a destructor may run anywhere, also while this thread has the lock.
        self.changed = threading.Condition(threading.RLock())
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.running: Job | None = None
        self.used_bytes = self.drops = 0
        self.clears = Clears(REMEMBERED_CLEARS)
        self.thread: threading.Thread | None = None
        self.is_closing = False

    def start_thread(self) -> bool:
        """Start the thread unless it runs; return False if the process can start none."""
        if self.thread is None:
            thread = threading.Thread(target=_work, args=(self,), name="vlcache-writes", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread is left, or the interpreter exits
                return False
            self.thread = thread
        return True


def _work(state: _State) -> None:
    while True:
        with state.changed:
            is_there = state.changed.wait_for(lambda: bool(state.jobs) or state.is_closing, IDLE_S)
            if not is_there or not state.jobs:
                state.thread = None
                state.changed.notify_all()
                return
            state.running = state.jobs.popitem(last=False)[1]
        state.running.run(state.running)
        with state.changed:
            state.used_bytes -= state.running.nbytes
            state.running = None
            state.changed.notify_all()


def _finish(state: _State, timeout_s: float) -> None:
    if state.pid != os.getpid():
        return
    with state.changed:
        state.is_closing = True
        state.changed.notify_all()
        thread = state.thread
        if thread is not threading.current_thread():  # the thread itself may drop the last reference
            state.changed.wait_for(lambda: state.thread is None, timeout_s)
            state.drops += len(state.jobs)
            state.used_bytes -= sum(job.nbytes for job in state.jobs.values())
            state.jobs.clear()
    if thread is not None and thread is not threading.current_thread() and state.thread is None:
        thread.join(timeout_s)
