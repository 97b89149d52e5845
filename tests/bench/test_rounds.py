from collections.abc import Callable

import pytest

from vlcache_fx.bench.rounds import Summary, System, fastest_seconds, interleave, paired_ratio, time_once


def logged(log: list[str], text: str) -> Callable[[], None]:
    return lambda: log.append(text)


def test_interleave_order() -> None:
    log: list[str] = []
    systems = {name: System(logged(log, name)) for name in ("a", "b")}
    seconds = interleave(systems, 3)
    assert log == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_interleave_fewer_rounds() -> None:
    log: list[str] = []
    systems = {"a": System(logged(log, "a"), rounds=1), "b": System(logged(log, "b"))}
    seconds = interleave(systems, 2, logged(log, "."))
    assert log == ["a", ".", "b", ".", "b", "."]
    assert len(seconds["a"]) == 1


def test_time_once_prepares_and_checks() -> None:
    log: list[str] = []
    seconds = time_once(System(logged(log, "run"), logged(log, "prepare"), logged(log, "check")))
    assert log == ["prepare", "run", "check"]
    assert seconds >= 0


def test_time_once_failed_check() -> None:
    def check() -> None:
        raise RuntimeError("not warm")

    with pytest.raises(RuntimeError, match="not warm"):
        interleave({"a": System(lambda: None, check=check)}, 1)


def test_time_once_excludes_preparation_and_check(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def spend(seconds: float) -> Callable[[], None]:
        def act() -> None:
            clock[0] += seconds

        return act

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert time_once(System(spend(2), spend(10), spend(10))) == 2


def test_summary_of_values() -> None:
    assert Summary.of([5, 1, 3]) == Summary(3, 1, 5)


def test_paired_ratio_within_rounds() -> None:
    # Each round is slower than the previous round, as on a busy machine; the ratio is always 2.
    assert paired_ratio([2, 20, 200], [1, 10, 100]) == Summary(2, 2, 2)


def test_paired_ratio_fewer_rounds() -> None:
    assert paired_ratio([4], [1, 100]) == Summary(4, 4, 4)


def test_fastest_seconds_has_a_limit() -> None:
    runs: list[None] = []
    fastest_seconds(lambda: runs.append(None), 5, limit_s=0.0)
    assert len(runs) == 2  # the first is not counted


def test_fastest_seconds_ignores_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 0.0, 5.0, 0.0, 3.0, 0.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert fastest_seconds(lambda: None, 3) == 3.0
