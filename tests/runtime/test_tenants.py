"""Requests with different salts share nothing, and learn nothing of each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vlcache_fx.errors import OptionError, Reason
from vlcache_fx.inserted_pass import InsertedPass
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, keys, with_api, with_backend

INPUTS = tiny_vlm_inputs(20, 4, [(20, 1)])


@pytest.fixture(scope="module", params=[with_api, with_backend])
def pair(request: pytest.FixtureRequest, _compiler: None) -> Pair:
    compiled: Callable[..., Pair] = request.param
    return compiled(tiny_vlm(num_layers=1, last_only=False), salt="own")


@pytest.fixture(autouse=True)
def _clear(pair: Pair) -> None:
    pair.engine.clear()


def ask(pair: Pair, salt: str | None) -> dict[str, Any]:
    with pair.engine.using(salt=salt):
        error, report = pair.run(**INPUTS)
    assert error <= 1e-5
    return report


def test_nothing_is_shared(pair: Pair) -> None:
    reports = [ask(pair, salt) for salt in ("own", "a", "b")]
    assert [report.mode for report in reports] == ["cold"] * 3
    assert [report.encoder_hit for report in reports] == [False] * 3
    assert [report.prefix_tokens for report in reports] == [0] * 3
    assert len({keys(report)[0] for report in reports}) == 3
    assert ask(pair, None).prefix_tokens == len(INPUTS["input_ids"][0])  # the option's salt
    assert ask(pair, "a").mode == "warm"
    stored = [entry.key for entry in pair.engine.store.entries()]
    assert len({key.split("-")[1] for key in stored}) == 3


def test_no_reason_tells_of_others(pair: Pair) -> None:
    assert ask(pair, "a").reason_code == Reason.NEW_ITEM
    pair.engine.store.clear()
    assert ask(pair, "b").reason_code == Reason.NEW_ITEM
    assert ask(pair, "a").reason_code == Reason.NOT_RECORDED


def test_other_weights_are_not_told(pair: Pair) -> None:
    (parameter, *_) = (own for name, own in pair.model.named_parameters() if "layers" in name)
    ask(pair, "a")
    with torch.no_grad():
        parameter.add_(0.5)
    try:
        for salt, reason in (("b", Reason.NEW_ITEM), ("a", Reason.OTHER_WEIGHTS)):
            with pair.engine.using(salt=salt), torch.no_grad():
                pair.model(**INPUTS)
            assert pair.report.reason_code == reason
    finally:
        with torch.no_grad():
            parameter.sub_(0.5)


@pytest.mark.parametrize("salt", [3, b"a", ["a"]])
def test_salt_is_a_string(pair: Pair, salt: Any) -> None:
    with pytest.raises(OptionError, match=r"salt=.*must be a string"), pair.engine.using(salt=salt):
        pass


def test_salt_and_passes() -> None:
    """The user's passes stay part of every key."""

    class Step:
        name = "nothing"

        def run(self, graph: nn.Module) -> None:
            """Do nothing."""

        def fingerprint(self) -> str:
            return "one"

    step: Any = Step()
    options = Options(lowering="eager", passes=(InsertedPass(step, "cleanup", after="dead_code"),))
    plain, engine = ServingEngine(Options(lowering="eager")), ServingEngine(options)
    assert (plain.key_salt, engine.key_salt) == ("", options.key_salt)
    with plain.using(salt="a"), engine.using(salt="a"):
        assert plain.key_salt == "a"
        assert engine.key_salt == Options(salt="a", passes=options.passes).key_salt != "a"
    assert engine.key_salt == options.key_salt


def test_tenants_in_tasks(pair: Pair) -> None:
    """Tasks that interleave in one thread, and calls in other threads, keep their salts and reports."""

    async def tenant(salt: str) -> list[str]:
        with pair.engine.using(salt=salt), pair.engine.reports() as reports:
            for _ in range(3):
                await asyncio.to_thread(pair.run, **INPUTS)
                await asyncio.sleep(0)
                pair.run(**INPUTS)
        assert pair.engine.last_report == reports[-1]  # the task's own last call
        assert [report.mode for report in reports] == ["cold"] + ["warm"] * 5
        return [key for report in reports for key in keys(report)]

    async def serve() -> list[list[str]]:
        return await asyncio.gather(*(tenant(salt) for salt in "abcd"))

    found = asyncio.run(serve())
    assert [len(set(own)) for own in found] == [1] * 4
    assert len({own[0] for own in found}) == 4
