"""What ``clear`` drops, and that requests that run do not bring it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlcache_fx.errors import OptionError, Reason
from vlcache_fx.keys.entry_key import KeyScope, Selection
from vlcache_fx.runtime.donors.recent_keys import RecentKeys, RecentLookups
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.store.clears import MAX_CLEARS, Clears
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, keys, with_api

IMAGE = 20


@pytest.fixture(scope="module")
def pair(_compiler: None) -> Pair:
    return with_api(tiny_vlm(num_layers=1, last_only=False), policy="full")


@pytest.fixture(autouse=True)
def _clear(pair: Pair) -> None:
    pair.engine.clear()


def ask(pair: Pair, image: int = 1, text: int = 0) -> dict[str, Any]:
    """Call the model, check its result, and return the report."""
    error, report = pair.run(**tiny_vlm_inputs(3 + text, 4, [(IMAGE, image)], text_seed=text))
    assert error <= 1e-5
    return report


def kinds(pair: Pair) -> list[str]:
    return sorted(entry.key.split("-")[0] for entry in pair.engine.store.entries())


def test_all(pair: Pair) -> None:
    ask(pair)
    assert kinds(pair) == ["donor", "features", "text", "text"]
    assert pair.engine.clear() == 4
    assert pair.engine.clear() == 0
    assert ask(pair).reason_code == Reason.NEW_ITEM  # nothing is remembered


def test_salt(pair: Pair) -> None:
    for salt in ("", "a", "b"):
        with pair.engine.using(salt=salt):
            assert ask(pair, 7).reason_code == Reason.NEW_ITEM
    assert pair.engine.clear(salt="a") == 4
    assert pair.engine.clear(salt="unknown") == 0
    for salt, mode in (("", "warm"), ("a", "cold"), ("b", "warm")):
        with pair.engine.using(salt=salt):
            report = ask(pair, 7)
            assert (report.mode, report.reason_code) == (mode, "new_item" if mode == "cold" else None)


def test_key(pair: Pair) -> None:
    one, two = ask(pair, 1), ask(pair, 2)
    assert pair.engine.clear(key=keys(one)[0]) == 1
    again = ask(pair, 1, text=1)
    assert (again.mode, again.encoder_hit, again.reason_code) == ("cold", True, "new_item")
    assert ask(pair, 2, text=1).mode == "warm"
    assert pair.engine.clear(key=keys(two)[0], salt="a") == 0


def test_key_drops_exact_rows_too() -> None:
    pair = with_api(tiny_vlm(num_layers=1, last_only=False), policy="none", shadow=1.0, shadow_max_kl=None)
    for text in range(2):
        report = ask(pair, text=text)
    assert kinds(pair).count("exact") == kinds(pair).count("donor") == 1
    assert pair.engine.clear(key=keys(report)[0]) == 2
    assert not {"exact", "donor"} & set(kinds(pair))


def test_model(pair: Pair) -> None:
    fingerprint = ask(pair).model_fingerprint
    assert pair.engine.clear(model="0" * 64) == 0
    assert pair.engine.clear(model=fingerprint) == 3
    assert kinds(pair) == ["features"]  # of the encoder's weights
    assert ask(pair).mode == "cold"


def test_closed_engine() -> None:
    pair = with_api(tiny_vlm(num_layers=1))
    pair.engine.close()
    assert pair.engine.clear() == pair.engine.clear(salt="a") == 0


@pytest.mark.parametrize("argument", ["salt", "model", "key"])
def test_bad_argument(pair: Pair, argument: str) -> None:
    with pytest.raises(OptionError, match=rf"clear\({argument}=3\).*must be a string"):
        pair.engine.clear(**{argument: 3})


@pytest.mark.parametrize("argument", ["none", "salt", "model", "key", "other"])
def test_rows_of_running_request(pair: Pair, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request computes that began before ``clear`` is not stored, unless it does not match."""
    report = ask(pair)
    given = {
        "none": {}, "salt": {"salt": ""}, "model": {"model": report.model_fingerprint},
        "key": {"key": keys(report)[0]}, "other": {"salt": "b"},
    }[argument]  # fmt: skip
    pair.engine.clear()
    run = ProgramRunner.run

    def clears(self: ProgramRunner, *args: Any) -> Any:
        pair.engine.clear(**given)
        return run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ProgramRunner, "run", clears)
        assert ask(pair).mode == "cold"
    assert ("donor" in kinds(pair)) is (argument == "other")
    assert not pair.engine.unstorable._keys
    assert ask(pair).mode == ("warm" if argument == "other" else "cold")
    assert ask(pair).mode == "warm"


def test_features_of_running_request(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    put: Callable[..., Any] = pair.engine.store.put

    def clears_first(key: str, entry: Any) -> bool:
        pair.engine.clear(salt="")
        return bool(put(key, entry))  # while ``clear`` has ended

    with monkeypatch.context() as patch:
        patch.setattr(pair.engine.store, "put", clears_first)
        ask(pair)
    assert kinds(pair) == []


def test_running_request_keeps_its_donors(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(pair)
    run = ProgramRunner.run

    def clears(self: ProgramRunner, *args: Any) -> Any:
        pair.engine.clear()
        return run(self, *args)

    monkeypatch.setattr(ProgramRunner, "run", clears)
    with pair.engine.using(policy="full"):
        assert ask(pair, text=1).mode == "warm"


def test_clears() -> None:
    clears, scope = Clears(), KeyScope("a", "0" * 64)
    key = scope.key("donor", {"content": "x"})
    began = clears.number
    assert not clears.covers(key, began)
    clears.add(Selection(salt="b"))
    assert not clears.covers(key, began)
    clears.add(Selection(salt="a"))
    assert clears.covers(key, began)
    assert not clears.covers(key, clears.number)
    began = clears.number
    for _ in range(MAX_CLEARS):
        clears.add(Selection(salt="b"))
    assert not clears.covers(key, began)
    clears.add(Selection(salt="b"))
    assert clears.covers(key, began)  # too long ago to know
    clears.add(None)
    assert clears.covers(key, clears.number - 1)


def test_memories_forget_selected_keys() -> None:
    made = {salt: KeyScope(salt, "0" * 64).key("donor", {"content": "x"}) for salt in "ab"}
    missed, lookups = RecentKeys(), RecentLookups()
    for key in made.values():
        missed.add(key)
        lookups.add(key, {"content": "x"})
    for memory in (missed, lookups):
        memory.clear(Selection(salt="a"))
    assert (made["a"] in missed, made["b"] in missed) == (False, True)
    assert [lookups.add(made[salt], {"content": "x"})[1] for salt in "ab"] == [False, True]
    missed.clear()
    assert made["b"] not in missed


def test_refined_donor_of_running_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shadow run refines the donor that ``clear`` drops meanwhile."""
    pair = with_api(tiny_vlm(num_layers=1, last_only=False), policy="none", shadow=1.0, shadow_max_kl=None)
    ask(pair)
    run = ProgramRunner.run

    def clears(self: ProgramRunner, *args: Any) -> Any:
        pair.engine.clear()
        return run(self, *args)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(ProgramRunner, "run", clears)
        assert ask(pair, text=1).mode == "warm"
    assert kinds(pair) == []
