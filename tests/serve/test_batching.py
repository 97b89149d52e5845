"""Queues: what runs together, what is refused, and what happens to those who leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch

from vlcache_fx.serve.batching import Batcher
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.job import Job
from vlcache_fx.serve.metrics import ServeMetrics
from vlcache_fx.serve.request import RequestSettings

from .fakes import BAD, EOS, CountingModel, make_job


@pytest.fixture
def model() -> Iterator[CountingModel]:
    model = CountingModel()
    yield model
    model.gate.set()
    model.vlcache.close()


@contextmanager
def batcher(model: CountingModel, **given: Any) -> Iterator[Batcher]:
    options = {"batch_size": 4, "batch_tokens": 2048, "batch_wait_ms": 0.0, "max_waiting": 8, **given}
    found = Batcher("m", model, sampling=threading.Lock(), metrics=ServeMetrics(), **options)
    yield found
    model.gate.set()
    found.stop(timeout_s=10)


@asynccontextmanager
async def busy(model: CountingModel, queue: Batcher) -> AsyncIterator[Job]:
    """While the model is busy with a first request."""
    model.gate.clear()
    model.entered.clear()
    first = make_job(1, loop=asyncio.get_running_loop())
    queue.submit(first)
    await asyncio.to_thread(model.entered.wait, 10)
    yield first
    model.gate.set()
    await first.finished


def answers(jobs: list[Job]) -> list[list[int]]:
    return [job.row.token_ids for job in jobs]


def test_those_who_waited_run_together(model: CountingModel) -> None:
    async def main() -> list[Job]:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            jobs = [make_job(*range(10, 11 + n), loop=loop, max_new_tokens=n + 1) for n in range(4)]
            async with busy(model, queue):
                for job in jobs:
                    queue.submit(job)
            await asyncio.gather(*(job.finished for job in jobs))
            return jobs

    jobs = asyncio.run(main())
    assert model.batches == [[[1]], [[10], [10, 11], [10, 11, 12], [10, 11, 12, 13]]]
    # Each row ends at its own length, although the batch goes on.
    assert answers(jobs) == [[11], [12, 13], [13, 14, 15], [14, 15, 16, 17]]
    assert [job.row.finish_reason for job in jobs] == ["length"] * 4
    assert [job.batch_size for job in jobs] == [4] * 4
    assert all(job.timings_ms().keys() >= {"queue", "prefill", "decode"} for job in jobs)


def test_groups_and_sizes(model: CountingModel) -> None:
    """At most four run together, and only those with equal settings; nobody is overtaken for long."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            own = RequestSettings(salt="s")
            jobs = [make_job(30 + n, loop=loop, settings=own if n % 3 == 0 else None) for n in range(8)]
            async with busy(model, queue):
                queue.submit(*jobs)
            await asyncio.gather(*(job.finished for job in jobs))

    asyncio.run(main())
    assert model.batches[1:] == [[[30], [33], [36]], [[31], [32], [34], [35]], [[37]]]
    assert [settings.salt for settings in model.settings[1:]] == ["s", "", ""]


def test_waiting_for_others_is_bounded(model: CountingModel) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with batcher(model, batch_wait_ms=10_000.0, batch_size=2) as queue:
            first, second = make_job(1, loop=loop), make_job(5, loop=loop)
            queue.submit(first)
            await asyncio.sleep(0.05)
            queue.submit(second)  # the batch is full, and runs at once
            await asyncio.wait_for(asyncio.gather(first.finished, second.finished), 5)
        with batcher(model, batch_wait_ms=20.0) as queue:
            alone = make_job(9, loop=loop)
            queue.submit(alone)
            await asyncio.wait_for(alone.finished, 5)

    asyncio.run(main())
    assert model.batches == [[[1], [5]], [[9]]]


def test_full_queue_refuses(model: CountingModel) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with batcher(model, max_waiting=2) as queue:
            waiting = [make_job(1, loop=loop), make_job(2, loop=loop)]
            async with busy(model, queue):
                queue.submit(*waiting)
                with pytest.raises(RequestError) as caught:
                    queue.submit(make_job(3, loop=loop))
                assert (caught.value.status, caught.value.code) == (429, "queue_full")
                assert caught.value.retry_after_s is not None
                assert caught.value.response().headers["Retry-After"] == str(caught.value.retry_after_s)
            await asyncio.gather(*(job.finished for job in waiting))

    asyncio.run(main())
    assert model.batches == [[[1]], [[1], [2]]]


def test_one_bad_request_fails_alone(model: CountingModel) -> None:
    async def main() -> list[Job]:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            jobs = [make_job(5, loop=loop), make_job(BAD, loop=loop), make_job(7, loop=loop)]
            async with busy(model, queue):
                queue.submit(*jobs)
            await asyncio.gather(*(job.finished for job in jobs), return_exceptions=True)
            after = make_job(20, loop=loop)
            queue.submit(after)
            await after.finished
            return [*jobs, after]

    first, bad, last, after = asyncio.run(main())
    assert answers([first, last, after]) == [[6, 7, 8], [8, 9, 10], [21, 22, 23]]
    error = bad.finished.exception()
    assert isinstance(error, RequestError)
    assert (error.status, "bad" in error.message) == (500, False)


def test_those_who_leave(model: CountingModel) -> None:
    """A waiting job never runs; a running one ends its row, and the others go on."""

    async def main() -> list[Job]:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            waiting, stays = make_job(5, loop=loop), make_job(7, loop=loop)
            async with busy(model, queue) as running:
                queue.submit(waiting, stays)
                queue.cancel(waiting)
                queue.cancel(running)
                model.gate.set()
                await asyncio.gather(running.finished, return_exceptions=True)
                running.finished = loop.create_future()
                running.finished.set_result(None)
            await stays.finished
            return [running, waiting, stays]

    running, waiting, stays = asyncio.run(main())
    assert answers([running, waiting, stays]) == [[], [], [8, 9, 10]]
    assert model.batches == [[[1]], [[7]]]
    assert model.steps[0] == 1
    assert isinstance(waiting.finished.exception(), RequestError)


def test_end_tokens_and_stop_strings(model: CountingModel) -> None:
    async def main() -> tuple[list[Job], list[Any]]:
        loop = asyncio.get_running_loop()
        texts: asyncio.Queue[Any] = asyncio.Queue()
        with batcher(model) as queue:
            jobs = [
                make_job(EOS - 2, loop=loop, max_new_tokens=9),
                make_job(5, loop=loop, max_new_tokens=9, stops=("w8",), queue=texts),
            ]
            queue.submit(*jobs)
            await asyncio.gather(*(job.finished for job in jobs))
            return jobs, [texts.get_nowait() for _ in range(texts.qsize())]

    jobs, texts = asyncio.run(main())
    assert answers(jobs) == [[98, 99], [6, 7, 8]]
    assert [job.row.finish_reason for job in jobs] == ["stop", "stop"]
    assert texts[-1] is None
    assert "".join(texts[:-1]).split() == ["w6", "w7"]


def test_seeds_give_equal_answers(model: CountingModel) -> None:
    async def main() -> list[Job]:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            jobs = [make_job(5, loop=loop, sample=True, seed=seed) for seed in (3, 4, 3)]
            jobs.append(make_job(5, loop=loop, sample=True))
            queue.submit(*jobs)
            await asyncio.gather(*(job.finished for job in jobs))
            return jobs

    first, other, again, _ = answers(asyncio.run(main()))
    assert first == again != other
    torch.manual_seed(3)
    assert first == torch.cat([torch.randint(50, 90, (1, 1)) for _ in range(3)]).flatten().tolist()
    assert [len(batch) for batch in model.batches] == [1] * 4  # a request with a seed runs alone


def test_bypass_leaves_nothing_behind(model: CountingModel) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            bypass = RequestSettings(salt="t", bypass=True)
            jobs = [make_job(n, loop=loop, settings=bypass) for n in (1, 2, 3)]
            async with busy(model, queue):
                queue.submit(*jobs)
            await asyncio.gather(*(job.finished for job in jobs))

    asyncio.run(main())
    assert [len(batch) for batch in model.batches] == [1, 3]
    assert model.settings[1].salt not in ("", "t")


def test_stop_refuses_and_ends(model: CountingModel) -> None:
    async def main() -> list[Job]:
        loop = asyncio.get_running_loop()
        with batcher(model) as queue:
            waiting = make_job(5, loop=loop)
            model.gate.clear()
            running = make_job(1, loop=loop, max_new_tokens=50)
            queue.submit(running)
            await asyncio.to_thread(model.entered.wait, 10)
            queue.submit(waiting)
            stopping = asyncio.create_task(asyncio.to_thread(queue.stop, 10))
            await asyncio.gather(waiting.finished, return_exceptions=True)
            model.gate.set()
            await stopping
            with pytest.raises(RequestError, match="shutting down"):
                queue.submit(make_job(6, loop=loop))
            await asyncio.sleep(0)
            return [running, waiting]

    running, waiting = asyncio.run(main())
    assert model.steps == [1]
    assert isinstance(waiting.finished.exception(), RequestError)
    assert isinstance(running.finished.exception(), RequestError)


def test_a_client_that_leaves_with_its_answer_is_counted(model: CountingModel) -> None:
    """The answer can be with the client before the batch ends and is counted."""

    async def main() -> Job:
        with batcher(model) as queue:
            job = make_job(1, loop=asyncio.get_running_loop())
            job.first_token_s = job.ended_s = 1.0
            queue.cancel(job)
            return job

    job, metrics = asyncio.run(main()), ServeMetrics()
    metrics.saw_answer("m", job)
    assert 'vlcache_serve_request_seconds_count{model="m"} 1.0' in metrics.text()


@pytest.mark.parametrize("is_example", [True, False])
def test_examples_are_in_no_metric(is_example: bool) -> None:
    """Their times are those of compilations."""

    async def main() -> Job:
        return make_job(1, loop=asyncio.get_running_loop())

    job, metrics = asyncio.run(main()), ServeMetrics()
    job.is_example, job.first_token_s = is_example, 1.0
    metrics.saw_answer("m", job)
    counted = 'vlcache_serve_request_seconds_count{model="m"} 1.0' in metrics.text()
    assert counted is not is_example
