"""Encoders that run before the decoder: one new image in several requests is encoded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.compiling import compiling
from vlcache_fx.keys.entry_key import salt_tag
from vlcache_fx.runtime import in_flight
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

from ..runtime.helpers import Pair, ask_at_once, own_compiler_state, with_api

THREADS = 4
SIZES = {0: (8, 8), 1: (4, 12)}


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "LEAST_PATIENCE_S", 60.0)


Prompt = Callable[..., Mapping[str, Tensor]]


def qwen_prompt(text: int, *images: int) -> Mapping[str, Tensor]:
    return qwen_inputs(4 + text, 5, [(*SIZES[image], image) for image in images], text_seed=text)


def llava_prompt(text: int, *images: int) -> Mapping[str, Tensor]:
    return llava_inputs(4 + text, 5, images, text_seed=text)


def encoded(pair: Pair) -> int:
    return int(pair.engine.stats()["encoder"]["misses"])


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        pytest.param(tiny_qwen2_5_vl, qwen_prompt, id="grids"),
        # Threads and encoders of pixels meet below; requests for one image are told apart as with grids.
        pytest.param(tiny_llava, llava_prompt, id="pixels", marks=pytest.mark.thorough),
    ],
)
def test_new_images_are_encoded_once(
    model: Callable[[int], Any], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = with_api(model(1), policy="full", min_span_tokens=4)
    for text in range(2):  # all programs
        pair.run(**prompt(text, 0))
    pair.run(**prompt(0, 1, 0))
    pair.engine.clear()
    before = encoded(pair)
    with pair.engine.reports() as reports:
        ask_at_once(pair, [prompt(text, 0) for text in range(THREADS)], tolerance=1e-4)
    assert encoded(pair) == before + 1
    assert sorted(report.mode for report in reports) == ["cold"] + ["warm"] * (THREADS - 1)

    pair.engine.clear()
    before = encoded(pair)
    ask_at_once(
        pair, [prompt(text, *((0, 1) if text % 2 else (1, 0))) for text in range(THREADS)], tolerance=1e-4
    )
    assert encoded(pair) == before + 1

    monkeypatch.setattr(pair.engine, "store", MemoryStore(1))
    before = encoded(pair)
    ask_at_once(pair, [prompt(text, 0) for text in range(THREADS)], tolerance=1e-4)
    assert encoded(pair) == before + THREADS


@pytest.fixture(scope="module")
def llava(_compiler: None) -> Pair:
    return with_api(tiny_llava(1), policy="full", min_span_tokens=4)


def test_salt_of_a_call(llava: Pair) -> None:
    pair = llava
    pair.run(**llava_prompt(0, 0))  # the first call changes the model's state, which is part of keys
    hits = []
    for salt in ("a", "b", "a"):
        with pair.engine.using(salt=salt):
            hits.append(pair.run(**llava_prompt(0, 0))[1].encoder_hit)
    assert hits == [False, False, True]
    assert pair.engine.clear(salt="a") == pair.engine.clear(salt="b") > 0
    assert not [entry for entry in pair.engine.store.entries() if salt_tag("a") in entry.key]


def test_no_thread_compiles_while_an_encoder_runs(llava: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a compilation, ``torch.compiler.is_compiling()`` is true in all threads: encoders misread it."""
    pair = llava
    pair.run(**llava_prompt(3, 0))
    seen: list[bool] = []
    tower = pair.model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, args: seen.append(torch.compiler.is_compiling()))
    asks = threading.Thread(target=pair.run, kwargs=llava_prompt(3, 1))
    with compiling():
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        asks.start()
        asks.join(0.5)
        assert asks.is_alive()
        assert seen == []
        monkeypatch.undo()
    asks.join(60)
    assert seen == [False]
