"""No recompilation for other images, prompts, offsets, budgets, policies and numbers of spans."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

from .runtime.helpers import Pair, own_compiler_state, with_api

pytest.importorskip("transformers")

POLICIES = ("layer_aware", "first_k", "uniform", "none", "full")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def ask(pair: Pair, seed: int, num_images: int) -> None:
    """Generate two tokens for a prompt drawn from ``seed``: a prefill and a decoding step."""
    draw = random.Random(seed)
    images = [
        (draw.choice((8, 10, 12)), draw.choice((8, 10, 12)), draw.randrange(3)) for _ in range(num_images)
    ]
    inputs = qwen_inputs(draw.randrange(3, 40), draw.randrange(3, 30), images, seed, draw.randrange(1, 5))
    with torch.no_grad(), pair.engine.using(policy=draw.choice(POLICIES), budget=draw.random()):
        pair.model.generate(**inputs, max_new_tokens=2, do_sample=False)


@pytest.mark.works("torch.compile", "requests of many lengths, with `dynamic` and without", "compile nothing")
@pytest.mark.parametrize("dynamic", [pytest.param(True, marks=pytest.mark.thorough), None])
def test_varied_requests_compile_nothing(dynamic: bool | None) -> None:
    pair = with_api(tiny_qwen2_5_vl(1), dynamic=dynamic, min_span_tokens=4)
    # Each kind of call once or twice: text only, cold, warm, and the decoding step after each.
    for seed, num_images in enumerate((0, 0, 1, 1, 2, 2)):
        ask(pair, seed, num_images)
        ask(pair, seed, num_images)
    graphs, modes = counters["stats"]["unique_graphs"], dict(pair.engine.stats()["calls"])
    assert graphs > 0
    for seed in range(50):
        ask(pair, 100 + seed, seed % 4)
    assert counters["stats"]["unique_graphs"] == graphs
    calls = {mode: count - modes[mode] for mode, count in pair.engine.stats()["calls"].items()}
    assert sum(calls.values()) == 50
    assert calls["warm"] > 20
    assert calls["cold"] > 5
