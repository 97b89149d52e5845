"""The queue of slow writes: its bounds, one job per key, cancelling, its thread."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from tests.store.tiers import OTHER, TENANT, entry, key
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.write_queue import Job, Kind, WriteQueue

TIMEOUT_S = 60.0


class Recorder:
    """Runs jobs: notes their marks, each after ``gate`` opens."""

    def __init__(self) -> None:
        self.marks: list[object] = []
        self.gate, self.running = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> None:
        self.running.set()
        assert self.gate.wait(TIMEOUT_S)
        self.marks.append("void" if job.is_cancelled else job.entry.info["mark"])

    def job(self, number: int, mark: int, *, nbytes: int = 10, kind: Kind = Kind.PUT, since: int = 0) -> Job:
        return Job(kind, key(number), entry(nbytes, mark), [0], since, self)


@pytest.fixture
def queue() -> Iterator[WriteQueue]:
    queue = WriteQueue(100, 8, TIMEOUT_S)
    yield queue
    queue.close(TIMEOUT_S)


@pytest.fixture
def recorder(queue: WriteQueue) -> Iterator[Recorder]:
    """A recorder with one job running, mark 0, so that later jobs stay queued."""
    recorder = Recorder()
    assert queue.offer(recorder.job(0, 0))
    assert recorder.running.wait(TIMEOUT_S)
    yield recorder
    recorder.gate.set()


def finish(queue: WriteQueue, recorder: Recorder) -> list[object]:
    recorder.gate.set()
    assert queue.flush(TIMEOUT_S)
    return recorder.marks


def test_jobs_run_in_order(queue: WriteQueue, recorder: Recorder) -> None:
    assert all(queue.offer(recorder.job(number, number)) for number in (1, 2, 3))
    assert queue.used_bytes == 40
    assert not queue.flush(0)
    assert finish(queue, recorder) == [0, 1, 2, 3]
    assert (queue.used_bytes, queue.drops) == (0, 0)


def test_latest_value_of_a_key_wins(queue: WriteQueue, recorder: Recorder) -> None:
    for mark in (1, 2, 3):
        assert queue.offer(recorder.job(1, mark, nbytes=80))
    found = queue.find(key(1))
    assert found is not None
    assert found.info["mark"] == 3
    assert finish(queue, recorder) == [0, 3]


def test_bytes_are_bounded(queue: WriteQueue, recorder: Recorder) -> None:
    assert queue.offer(recorder.job(1, 1, nbytes=90))
    assert not queue.offer(recorder.job(2, 2, nbytes=1))
    assert not queue.offer(recorder.job(1, 3, nbytes=91))  # the older value stays
    assert queue.drops == 2
    assert finish(queue, recorder) == [0, 1]


def test_number_is_bounded(queue: WriteQueue, recorder: Recorder) -> None:
    assert [queue.offer(recorder.job(number, number, nbytes=1)) for number in range(1, 10)].count(True) == 8
    assert queue.offer(recorder.job(8, 80, nbytes=1))  # replaces
    assert queue.drops == 1


def test_large_job_is_taken_alone(queue: WriteQueue, recorder: Recorder) -> None:
    assert not queue.offer(recorder.job(1, 1, nbytes=101))
    finish(queue, recorder)
    assert queue.offer(recorder.job(1, 1, nbytes=101))
    assert finish(queue, recorder) == [0, 1]


def test_older_values_do_not_replace_newer_ones(queue: WriteQueue, recorder: Recorder) -> None:
    queue.offer(recorder.job(1, 1, kind=Kind.PROMOTION))
    assert queue.find(key(1)) is None  # a promotion is in a lower tier anyway
    queue.offer(recorder.job(1, 2, kind=Kind.EVICTION))
    queue.offer(recorder.job(1, 3, kind=Kind.PROMOTION))
    queue.offer(recorder.job(2, 4))
    queue.offer(recorder.job(2, 5, kind=Kind.EVICTION))
    assert finish(queue, recorder) == [0, 2, 4]


def test_put_voids_a_running_promotion(queue: WriteQueue) -> None:
    recorder = Recorder()
    queue.offer(recorder.job(1, 1, kind=Kind.PROMOTION))
    assert recorder.running.wait(TIMEOUT_S)
    queue.offer(recorder.job(1, 2, nbytes=1000))  # dropped: the first tier has it all the same
    assert queue.is_cancelled(key(1))
    assert finish(queue, recorder) == ["void"]


def test_cancel_drops_and_voids(queue: WriteQueue, recorder: Recorder) -> None:
    other = Job(Kind.PUT, key(1, OTHER), entry(5, 7), [0], 0, recorder)
    queue.offer(recorder.job(1, 1))
    queue.offer(other)
    queue.cancel(Selection(salt=TENANT.salt))
    assert queue.used_bytes == 15
    assert queue.is_cancelled(key(0))
    assert queue.find(key(0)) is None
    assert queue.find(key(1)) is None
    assert queue.find(other.key) is other.entry
    assert not queue.wait_for_cancelled(0)
    recorder.gate.set()
    assert queue.wait_for_cancelled(TIMEOUT_S)
    assert finish(queue, recorder) == ["void", 7]


def test_late_jobs_of_cleared_keys_are_dropped(queue: WriteQueue) -> None:
    recorder = Recorder()
    recorder.gate.set()
    since = queue.generation
    queue.cancel(Selection(salt=OTHER.salt))
    assert queue.offer(recorder.job(1, 1, since=since))  # another tenant
    assert queue.flush(TIMEOUT_S)
    queue.cancel(Selection(salt=TENANT.salt))
    assert not queue.offer(recorder.job(2, 2, since=since))
    assert queue.offer(recorder.job(2, 3, since=queue.generation))
    for _ in range(20):
        queue.cancel(Selection(salt=OTHER.salt))
    assert not queue.offer(recorder.job(4, 4, since=since))  # too long ago to know
    assert finish(queue, recorder) == [1, 3]


def test_close_writes_what_is_queued(queue: WriteQueue, recorder: Recorder) -> None:
    queue.offer(recorder.job(1, 1))
    recorder.gate.set()
    queue.close(TIMEOUT_S)
    assert recorder.marks == [0, 1]
    assert not queue.offer(recorder.job(2, 2))


def test_close_is_bounded(queue: WriteQueue, recorder: Recorder) -> None:
    queue.offer(recorder.job(1, 1))
    queue.close(0.05)  # the running job hangs
    assert queue.drops == 1
    assert recorder.marks == []


def test_thread_ends_with_the_queue() -> None:
    recorder = Recorder()
    recorder.gate.set()
    queue = WriteQueue(100, 8, TIMEOUT_S)
    queue.offer(recorder.job(1, 1))
    assert queue.flush(TIMEOUT_S)
    thread, gone = queue._state.thread, weakref.ref(queue)
    assert thread is not None
    del queue
    gc.collect()
    assert gone() is None
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_no_thread_without_work() -> None:
    before = threading.active_count()
    queue = WriteQueue(100, 8, TIMEOUT_S)
    assert queue.flush(TIMEOUT_S)
    assert threading.active_count() == before
    queue.close(TIMEOUT_S)


def test_promotions_make_room_for_puts(queue: WriteQueue, recorder: Recorder) -> None:
    for number in (1, 2, 3):
        assert queue.offer(recorder.job(number, number, nbytes=30, kind=Kind.PROMOTION))
    assert not queue.offer(recorder.job(4, 4, nbytes=30, kind=Kind.PROMOTION))
    assert queue.offer(recorder.job(5, 5, nbytes=50))
    assert queue.drops == 3
    assert finish(queue, recorder) == [0, 3, 5]


SCRIPT = """
import os, threading
from tests.store.tiers import entry, key
from vlcache_fx.store.write_queue import Job, Kind, WriteQueue

queue, hanging, done = WriteQueue(100, 8, 60), WriteQueue(100, 8, 0.1), []

def late(job):
    threading.Event().wait(0.2)
    print("written", flush=True)

def job(number, run):
    return Job(Kind.PUT, key(number), entry(1), [0], 0, run)

queue.offer(job(1, lambda job: done.append(1)))
queue.flush(60)
child = os.fork()
queue.offer(job(2, lambda job: done.append(2)))
queue.flush(60)
assert done == [1, 2], done
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
queue.offer(job(3, late))
hanging.offer(job(4, lambda job: threading.Event().wait()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_and_exits() -> None:
    """A child has a thread of its own; exits wait for queued work, but not for a write that hangs."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["written", "written"], "")
