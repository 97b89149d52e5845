"""Graphs that are encoders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.encoder import Encoder
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from ..runtime.helpers import own_compiler_state
from .graphs import PIXELS, PROMPT, Looking, LookingAndWriting, LookingAtRandom, traced, traced_call


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_match_encoder() -> None:
    found = Encoder.match(traced(Looking(), PIXELS))
    assert found is not None
    assert found.split.encoder_indices == (0,)
    assert Encoder.match(traced(tiny_vlm(), PROMPT)) is None


@pytest.mark.parametrize(
    ("model", "reason"), [(LookingAndWriting, Reason.MUTATED_INPUTS), (LookingAtRandom, Reason.RANDOM)]
)
def test_match_refuses(model: type[Looking], reason: Reason) -> None:
    call = PIXELS | ({"count": torch.zeros(1)} if model is LookingAndWriting else {})
    with pytest.raises(UnsupportedGraphError) as refused:
        Encoder.match(traced(model(), call))
    assert refused.value.reason is reason


def test_compile_stores_results(eager: Engine) -> None:
    model = Looking()
    graph, args = traced_call(model, PIXELS)
    found = Encoder.match(graph)
    assert found is not None
    run = found.compile(eager)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(*args)[0], model(**PIXELS))
    assert eager.stats()["encoder"] == {"hits": 1, "misses": 1}
