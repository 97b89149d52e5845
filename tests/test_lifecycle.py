"""Compiled models are freed with all their state, and closed engines run the unmodified model."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.backend import engine_for
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import OptionError
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import own_compiler_state, with_api

LAYERS = 2
CLOSE = 1e-6


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def prompt(seed: int = 0) -> dict[str, Any]:
    return tiny_vlm_inputs(5, 6, [(24, 0)], text_seed=seed)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vlcache_fx")]


def used(**options: Any) -> Any:
    model = vlcache_fx.compile(
        tiny_vlm(num_layers=LAYERS), lowering="eager", dynamic=True, policy="full", **options
    )
    with torch.no_grad():
        model(**prompt())
        model(**prompt(1))
    assert model.vlcache.stats()["calls"]["warm"] == 1
    return model


def test_model_frees_engine_and_store() -> None:
    gone = []
    for _ in range(3):
        model = used()
        gone += [weakref.ref(weight) for weight in model.parameters()]
        gone += [weakref.ref(model.vlcache), weakref.ref(model.vlcache.store)]
        del model
        gc.collect()
        assert [one() for one in gone] == [None] * len(gone)


def test_model_with_encoder_cache_frees_engine() -> None:
    model = vlcache_fx.compile(tiny_qwen2_5_vl(1), lowering="eager")
    with torch.no_grad():
        model.generate(**qwen_inputs(3, 4, [(8, 8, 0)]), max_new_tokens=2, do_sample=False)
    gone = [*map(weakref.ref, model.parameters()), weakref.ref(model.vlcache)]
    del model
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)


def test_engine_does_not_keep_model() -> None:
    model = used()
    engine, gone = model.vlcache, [weakref.ref(weight) for weight in model.parameters()]
    assert engine.explain(**prompt())
    del model
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)
    with pytest.raises(OptionError, match="has no model"):
        engine.explain(**prompt())


def test_shared_engine_does_not_keep_models() -> None:
    options = {"lowering": "eager", "store": MemoryStore(1 << 30)}
    model = tiny_vlm(num_layers=LAYERS)
    model.forward = torch.compile(model.forward, backend="vlcache", options=options, dynamic=True)  # type: ignore[method-assign]
    with torch.no_grad():
        model(**prompt())
    gone = [weakref.ref(weight) for weight in model.parameters()]
    del model
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)
    assert engine_for(options).stats()["calls"]["cold"] == 1


@pytest.mark.parametrize("strict", [False, True])
def test_close_then_call(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    pair = with_api(tiny_vlm(num_layers=LAYERS), policy="full", strict=strict)
    pair.run(**prompt())
    pair.engine.close()
    pair.engine.close()
    pair.engine.clear()
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        for seed in range(3):
            off, report = pair.run(**prompt(seed))
            assert off < CLOSE
            assert report["mode"] != "warm"
    assert said(caplog) == ["vlcache: the store is closed, continuing without reuse"]
    assert pair.engine.stats()["store"]["entries"] == 0
    assert pair.engine.stats()["store_failures"] == 0


def test_close_before_first_call(caplog: pytest.LogCaptureFixture) -> None:
    pair = with_api(tiny_vlm(num_layers=LAYERS))
    pair.engine.close()
    pair.engine.clear()
    assert pair.engine.stats()["calls"] == {"cold": 0, "warm": 0, "bypass": 0}
    assert pair.run(**prompt())[0] < CLOSE
    assert len(said(caplog)) == 1


def test_store_closed_by_other_user() -> None:
    store = MemoryStore(1 << 30)
    pair, other = with_api(tiny_vlm(num_layers=LAYERS), store=store), Engine(None)
    other.close()
    store.close()
    assert pair.run(**prompt())[0] < CLOSE
    pair.engine.clear()


@pytest.mark.works("Weights", "`save_pretrained` of a compiled model", "saves the plain model")
def test_compiled_model_saves(tmp_path: Path) -> None:
    model = vlcache_fx.compile(tiny_qwen2_5_vl(1), lowering="eager")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
