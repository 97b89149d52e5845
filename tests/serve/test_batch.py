"""Which requests run together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from vlcache_fx.runtime.report import ReportView
from vlcache_fx.serve.batch import choose, num_computed
from vlcache_fx.serve.job import Job
from vlcache_fx.serve.request import RequestSettings

from .fakes import make_job


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    found = asyncio.new_event_loop()
    yield found
    found.close()


def jobs(loop: asyncio.AbstractEventLoop, *asked: tuple[int, str], bypass: bool = False) -> list[Job]:
    """Jobs of ``(tokens, pictures)``; each letter is a picture."""
    found = []
    for tokens, pictures in asked:
        job = make_job(*[1] * tokens, loop=loop, settings=RequestSettings(bypass=bypass))
        job.pictures = tuple(pictures)
        found.append(job)
    return found


def chosen(waiting: list[Job], known: str = "", batch_size: int = 8, max_tokens: int = 200) -> list[int]:
    return [waiting.index(job) for job in choose(waiting, batch_size, max_tokens, set(known))]


@pytest.mark.parametrize(
    ("asked", "known", "expected"),
    [
        pytest.param([(100, "a"), (100, "b"), (10, "c")], "", [0, 1], id="as many tokens as fit"),
        pytest.param([(300, "a"), (10, "b")], "", [0], id="a large one runs alone"),
        pytest.param([(10, "b"), (300, "a"), (10, "c")], "", [0, 2], id="a large one waits"),
        pytest.param([(300, "a"), (300, "a"), (300, "ab")], "a", [0, 1], id="known pictures count little"),
        pytest.param([(50, "a"), (50, "a"), (50, "b")], "", [0, 2], id="a new picture is computed once"),
        pytest.param([(50, "a"), (50, "ab"), (50, "b")], "a", [0, 1], id="also beside a known one"),
        pytest.param([(60, ""), (60, ""), (60, ""), (60, "")], "", [0, 1, 2], id="text"),
    ],
)
def test_tokens_decide(
    loop: asyncio.AbstractEventLoop, asked: list[tuple[int, str]], known: str, expected: list[int]
) -> None:
    assert chosen(jobs(loop, *asked), known) == expected


def test_no_more_than_the_batch_size(loop: asyncio.AbstractEventLoop) -> None:
    assert chosen(jobs(loop, *[(1, "")] * 5), batch_size=3) == [0, 1, 2]


def test_groups_stay_apart(loop: asyncio.AbstractEventLoop) -> None:
    waiting = [make_job(1, loop=loop, sample=index == 1) for index in range(3)]
    assert chosen(waiting) == [0, 2]
    alone = make_job(1, loop=loop, seed=1)
    assert chosen([alone, *waiting]) == [0]


def test_bypass_computes_all(loop: asyncio.AbstractEventLoop) -> None:
    """Each with its own salt: the same picture is computed twice anyway."""
    waiting = jobs(loop, (90, "a"), (90, "a"), (90, "a"), bypass=True)
    assert chosen(waiting, known="a") == [0, 1]


def test_examples_run_with_their_like(loop: asyncio.AbstractEventLoop) -> None:
    waiting = jobs(loop, (500, "a"), (500, "b"))
    for job in waiting:
        job.is_example = True
    assert chosen(waiting) == [0, 1]


def test_estimates(loop: asyncio.AbstractEventLoop) -> None:
    seen = {"a", "b"}
    both, one, none = jobs(loop, (100, "ab"), (100, "ax"), (100, "xy"))
    assert [num_computed(job, seen) for job in (both, one, none)] == [5, 50, 100]


@pytest.mark.parametrize(
    ("mode", "hits", "expected"),
    [("cold", [False, False], True), ("warm", [True, True], True), ("warm", [True, False], False)],
)
def test_pictures_that_left_no_donors_are_not_known(
    loop: asyncio.AbstractEventLoop, mode: str, hits: list[bool], expected: bool
) -> None:
    """A new picture behind a reused one is approximate: it is not recorded."""
    (job,) = jobs(loop, (10, "ab"))
    assert not job.leaves_donors
    job.report = ReportView(mode=mode, spans=tuple({"hit": hit} for hit in hits))
    assert job.leaves_donors is expected
    (aside,) = jobs(loop, (10, "ab"), bypass=True)
    aside.report = job.report
    assert not aside.leaves_donors
