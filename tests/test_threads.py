"""Several threads call several models during compilation: no call fails, nothing is refused."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock

from vlcache_fx.keys.entry_key import salt_tag
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import Pair, distance, own_compiler_state, unique_salt, with_api, with_backend

THREADS = 8


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def prompt(number: int) -> Mapping[str, Tensor]:
    """Return a call of one of a few lengths, with one of two images."""
    return tiny_vlm_inputs(3 + number % 3, 4, [(20, number % 2)], text_seed=number)


def models(compiled: Callable[..., Pair], **options: Any) -> list[Pair]:
    """Return two models of different structure, before compilation."""
    made = [tiny_vlm(num_layers=1, last_only=False), tiny_vlm(num_layers=1, explicit_mask=True, seed=1)]
    return [compiled(model, policy="full", salt=unique_salt(), **options) for model in made]


def off(pairs: list[Pair], number: int) -> float:
    """Return the distance of a call's result from that of the unmodified model."""
    pair = pairs[number // 2 % len(pairs)]
    with torch.no_grad():
        return distance(pair.model(**prompt(number)), pair.reference(**prompt(number)))


def check(pairs: list[Pair], offs: list[float]) -> None:
    assert max(offs) <= 1e-5
    calls = [pair.engine.stats()["calls"] for pair in pairs]
    assert all(one["warm"] > 0 and one["bypass"] == 0 for one in calls)
    assert sum(one["cold"] + one["warm"] for one in calls) == len(offs)
    assert [pair.engine.refusals for pair in pairs] == [[]] * len(pairs)


@pytest.mark.parametrize("compiled", [with_api, with_backend])
@pytest.mark.works("torch.compile", "threads")
def test_eight_threads_start_at_once(compiled: Callable[..., Pair]) -> None:
    pairs = models(compiled)
    # Settings of Dynamo are per thread.
    settings = [contextvars.copy_context() for _ in range(3 * THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        work = [pool.submit(one.run, off, pairs, number) for number, one in enumerate(settings)]
        check(pairs, [one.result() for one in work])


@pytest.mark.works("torch.compile", "asyncio")
def test_calls_from_coroutines() -> None:
    pairs = models(with_api)

    async def serve() -> list[float]:
        return await asyncio.gather(*(asyncio.to_thread(off, pairs, number) for number in range(24)))

    check(pairs, asyncio.run(serve()))


def test_tenants_in_coroutines() -> None:
    """Calls of several tenants at once: each has its salt, its settings and its report."""
    (pair, _) = models(with_api)
    off([pair], 0)

    def ask(number: int) -> tuple[float, str]:
        with pair.engine.reports() as reports:
            distance_off = off([pair], number)
        (report,) = reports
        assert report == pair.engine.last_report
        return distance_off, report.spans[0].key

    async def tenant(salt: str) -> list[tuple[float, str]]:
        with pair.engine.using(salt=salt, policy="full" if salt < "c" else "first_k", budget=1.0):
            return await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(6)))

    async def serve() -> list[list[tuple[float, str]]]:
        return await asyncio.gather(*(tenant(salt) for salt in "abcd"))

    found = asyncio.run(serve())
    assert max(distance_off for own in found for distance_off, _ in own) <= 1e-5
    tags = [{key.split("-")[1] for _, key in own} for own in found]
    assert tags == [{salt_tag(salt)} for salt in "abcd"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_threads_while_inductor_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    pairs = models(with_api, lowering="inductor")[:1]
    with ThreadPoolExecutor(THREADS) as pool:
        check(pairs, list(pool.map(lambda number: off(pairs, number), range(2 * THREADS))))


def test_compiled_calls_do_not_wait_for_compilation() -> None:
    pair = with_api(tiny_vlm(num_layers=1, last_only=False), policy="full")
    for number in range(3):
        off([pair], number)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(compile_lock.acquire).result()  # as during a long compilation
        try:
            assert held
            assert off([pair], 1) <= 1e-5
            assert pair.report["mode"] == "warm"
        finally:
            pool.submit(compile_lock.release).result()
