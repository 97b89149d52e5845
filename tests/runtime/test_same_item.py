"""Requests for one new image at the same time: the encoder and the cold program run once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from vlcache_fx.runtime import in_flight
from vlcache_fx.runtime.prefill import DecoderRunner
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, ask_at_once, settings_of, with_api

THREADS = 8
IMAGE = 20


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "LEAST_PATIENCE_S", 60.0)  # whatever else the machine does


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    pair = with_api(tiny_vlm(num_layers=1, last_only=False), policy="full")
    for number in range(3):  # all programs
        pair.run(**prompt(number, 1000 + number % 2))
    pair.run(**prompt(0, 1000, 1001))
    return pair


@pytest.fixture
def pair(compiled: Pair) -> Counted:
    compiled.engine.clear()
    before = compiled.engine.stats()
    return Counted(compiled.model, compiled.reference, compiled.engine, before)


class Counted(Pair):
    """A pair that counts from a start."""

    def __init__(self, model: Any, reference: Any, engine: Any, before: Mapping[str, Any]) -> None:
        super().__init__(model, reference, engine)
        self._before = before

    @property
    def counts(self) -> dict[str, int]:
        """Calls by mode, and encoder runs."""
        now = self.engine.stats()
        calls = {mode: now["calls"][mode] - self._before["calls"][mode] for mode in now["calls"]}
        return calls | {"encoded": now["encoder"]["misses"] - self._before["encoder"]["misses"]}


def prompt(text: int, *images: int) -> Mapping[str, Tensor]:
    return tiny_vlm_inputs(3 + text % 5, 4, [(IMAGE, image) for image in images], text_seed=text)


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_new_image_is_computed_once(pair: Counted, salt: str) -> None:
    with pair.engine.using(salt=salt):
        ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert pair.counts == {"cold": 1, "warm": THREADS - 1, "bypass": 0, "encoded": 1}


def test_waits_are_reported(pair: Counted) -> None:
    with pair.engine.reports() as reports:
        ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert sorted(report.mode for report in reports) == ["cold"] + ["warm"] * (THREADS - 1)
    (cold,) = (report for report in reports if report.mode == "cold")
    assert "wait" not in cold.timings_ms
    assert cold.reason_code == "new_item"


def test_crossed_images(pair: Counted) -> None:
    crossed = [prompt(number, *((1, 2) if number % 2 else (2, 1))) for number in range(THREADS)]
    ask_at_once(pair, crossed)
    assert pair.counts["cold"] == 1
    assert pair.counts["cold"] + pair.counts["warm"] == THREADS


def test_first_fails(pair: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cold run raises, as without memory: it and the others are answered all the same."""
    run, failed = ProgramRunner.run, []

    def fails_once(self: ProgramRunner, *args: Any) -> Any:
        if self.name == "cold" and not failed:
            failed.append(None)
            return None
        return run(self, *args)

    monkeypatch.setattr(ProgramRunner, "run", fails_once)
    ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert pair.counts == {"cold": 1, "warm": THREADS - 2, "bypass": 1, "encoded": 1}


def test_first_raises(pair: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    run, failed = DecoderRunner._run_cold, []

    def raises_once(self: DecoderRunner, *args: Any) -> Any:
        if not failed:
            failed.append(None)
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(DecoderRunner, "_run_cold", raises_once)
    with pytest.raises(KeyboardInterrupt):
        ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert pair.counts["cold"] == 1
    assert pair.counts["warm"] == THREADS - 2
    assert not pair.engine.in_flight._claims


def test_store_without_room(monkeypatch: pytest.MonkeyPatch, pair: Counted) -> None:
    """Nothing is stored: every request computes, and waits for at most the first."""
    monkeypatch.setattr(pair.engine, "store", MemoryStore(1))
    ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert pair.counts == {"cold": THREADS, "warm": 0, "bypass": 0, "encoded": THREADS}
    with pair.engine.reports() as reports:
        ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert [report.reason_code for report in reports] == ["too_large"] * THREADS
    assert not any("wait" in report.timings_ms for report in reports)
    pair.engine.clear()


def test_strict(pair: Counted) -> None:
    with settings_of(pair.engine, strict=True):
        ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    assert pair.counts["cold"] == 1


def test_shadow_runs() -> None:
    """Each warm run is computed in full as well, within its own request."""
    pair = with_api(tiny_vlm(num_layers=1, last_only=False), policy="none", shadow=1.0, shadow_max_kl=None)
    ask_at_once(pair, [prompt(number, 1) for number in range(THREADS)])
    ask_at_once(pair, [prompt(number, 2) for number in range(THREADS)])
    assert pair.engine.stats()["calls"]["cold"] == 2
    assert pair.engine.stats()["shadow"]["runs"] > 0


def test_tasks_in_threads(pair: Counted) -> None:
    def ask(number: int) -> float:
        return pair.run(**prompt(number, number % 2))[0]

    async def serve() -> list[float]:
        return await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(THREADS)))

    assert max(asyncio.run(serve())) <= 1e-5
    assert (pair.counts["cold"], pair.counts["encoded"]) == (2, 2)


@pytest.mark.parametrize("seed", range(2))
def test_random_images(pair: Counted, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(4):
        images = [draw.choices(range(4), k=draw.randint(1, 3)) for _ in range(THREADS)]
        ask_at_once(pair, [prompt(draw.randrange(9), *chosen) for chosen in images])
    assert pair.counts["bypass"] == 0
    assert not pair.engine.in_flight._claims
