"""The line of the log for a compiled program."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import vlcache_fx
from vlcache_fx.compiler.compile_clock import CompileClock, compile_line
from vlcache_fx.lowering.cache import CompileStats
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state


def clock(**elapsed_ms: float) -> Clock:
    found = Clock()
    found.elapsed_ms.update(elapsed_ms)
    return found


def test_the_first_program_of_a_graph_has_the_shared_steps() -> None:
    graph = clock(passes=100.0, capture=3000.0)
    cold, warm = CompileClock(graph, 28), CompileClock(graph, 28)
    cold.elapsed_ms.update(lowering=2000.0, passes=400.0)
    warm.elapsed_ms.update(passes=600.0)
    assert list(cold.take().items()) == [("capture", 3000.0), ("passes", 500.0), ("lowering", 2000.0)]
    assert warm.take() == {"passes": 600.0}


def test_line() -> None:
    found = CompileClock(clock(capture=3100.0), 28)
    found.elapsed_ms.update(lowering=10700.0, passes=400.0)
    assert compile_line("cold", "Qwen", "inductor", found, "3 of 28 segments compiled") == (
        "vlcache: compiled cold program of Qwen, 28 layers, lowering inductor, in 14.2 s "
        "(capture 3.1, passes 0.4, lowering 10.7; 3 of 28 segments compiled)"
    )
    found = CompileClock()
    found.elapsed_ms.update(lowering=40.0)
    assert compile_line("decoding step", "", "eager", found) == (
        "vlcache: compiled decoding step, lowering eager, in 0.0 s (lowering 0.0)"
    )


def test_segments_in_words() -> None:
    stats = CompileStats([("a", 1.0)])
    before = stats.counts
    assert stats.since(before) == ""
    stats.compilations += [("b", 1.0), ("c", 1.0)]
    stats.hits, stats.loaded = 26, 1
    assert stats.since(before) == "1 of 28 segments compiled, 1 loaded from disk"


def test_each_program_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with own_compiler_state():
        model = vlcache_fx.compile(tiny_vlm(), lowering="eager", dynamic=True)
        with torch.no_grad(), caplog.at_level(logging.INFO, logger="vlcache_fx"):
            for before in (3, 5, 7):
                model(**tiny_vlm_inputs(before=before, after=2, images=[(20, 0)]))
    found = [
        re.match(r"vlcache: compiled (.*), lowering eager, in [\d.]+ s \((.*)\)$", text)
        for text in caplog.messages
    ]
    lines = [line for line in found if line is not None]
    assert [line[1] for line in lines] == [
        "encoder of TinyVlm",
        "cold program of TinyVlm, 2 layers",
        "warm program of TinyVlm, 2 layers",
    ]
    steps = [re.sub(r" [\d.]+", "", line[2]) for line in lines]
    assert steps[1:] == ["capture, analysis, passes, lowering", "passes, lowering"]
