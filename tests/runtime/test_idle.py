"""Work for times without requests: when it begins, and what interrupts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vlcache_fx.errors import StoreError
from vlcache_fx.runtime import idle as module
from vlcache_fx.runtime.idle import MAX_WORK, IdleTime
from vlcache_fx.runtime.programs.lowered import current_check


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[IdleTime]:
    monkeypatch.setattr(module, "QUIET_S", 0.05)
    made = IdleTime(1.0)
    yield made
    made.close()


def steps(done: list[str], name: str, started: threading.Event, count: int = 400) -> Callable[[], None]:
    """Work of many short steps, each of which may be interrupted."""

    def work() -> None:
        check = current_check()
        assert check is not None
        started.set()
        for _ in range(count):
            check()
            time.sleep(0.005)
        done.append(name)

    return work


def test_work_runs_once_in_a_thread_of_its_own(idle: IdleTime) -> None:
    threads: list[str] = []
    idle.offer("a", lambda: threads.append(threading.current_thread().name))
    assert idle.wait(30)
    time.sleep(0.1)
    assert threads == ["vlcache-idle"]


def test_no_work_begins_while_a_request_runs(idle: IdleTime) -> None:
    done: list[str] = []
    with idle.request():
        idle.offer("a", lambda: done.append("a"))
        assert not idle.wait(0.3)
        assert not done
    assert idle.wait(30)
    assert done == ["a"]


def test_a_request_interrupts_work_which_begins_anew(idle: IdleTime) -> None:
    done: list[str] = []
    started = threading.Event()
    idle.offer("a", steps(done, "a", started, count=40))
    assert started.wait(30)
    with idle.request():
        started.clear()
        assert not started.wait(0.3)  # stopped, and not begun again
        assert not done
    assert idle.wait(30)
    assert done == ["a"]


def test_later_work_of_a_name_replaces_earlier(idle: IdleTime) -> None:
    done: list[str] = []
    with idle.request():
        for number in range(3):
            idle.offer("a", lambda number=number: done.append(f"a{number}"))  # type: ignore[misc]
    assert idle.wait(30)
    assert done == ["a2"]


def test_only_the_latest_work_is_kept(idle: IdleTime) -> None:
    done: list[int] = []
    with idle.request():
        for number in range(MAX_WORK + 3):
            idle.offer(str(number), lambda number=number: done.append(number))  # type: ignore[misc]
    assert idle.wait(30)
    assert done == list(range(3, MAX_WORK + 3))


def test_a_failure_is_logged_and_other_work_goes_on(idle: IdleTime, caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fails() -> None:
        raise StoreError("deliberate")

    idle.offer("a", fails)
    idle.offer("b", lambda: done.append("b"))
    assert idle.wait(30)
    assert done == ["b"]
    assert "work in idle time failed: StoreError: deliberate" in caplog.text


def test_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a quarter, the thread rests three times as long as it works."""
    monkeypatch.setattr(module, "QUIET_S", 0.0)
    idle, begun = IdleTime(0.25), []

    def work() -> None:
        begun.append(time.monotonic())
        time.sleep(0.1)

    for name in ("a", "b"):
        idle.offer(name, work)
    assert idle.wait(30)
    idle.close()
    assert begun[1] - begun[0] >= 0.4


def test_without_a_share_nothing_runs() -> None:
    idle = IdleTime(0.0)
    idle.offer("a", lambda: None)
    assert idle.wait(0)
    assert not any(thread.name == "vlcache-idle" for thread in threading.enumerate())


def test_close_interrupts_and_ends_the_thread(idle: IdleTime) -> None:
    done: list[str] = []
    started = threading.Event()
    idle.offer("a", steps(done, "a", started))
    assert started.wait(30)
    idle.close()
    assert not done
    assert not any(thread.name == "vlcache-idle" for thread in threading.enumerate())
    idle.offer("b", lambda: done.append("b"))
    assert idle.wait(0)
    idle.close()
