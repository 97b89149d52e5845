"""Models of accelerate: weights that live elsewhere between calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.errors import Reason
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

from ..runtime.helpers import Pair, own_compiler_state

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.mark.thorough
@pytest.mark.works("Weights", "`accelerate.cpu_offload`", "runs unmodified (`no_stream`)")
def test_offloaded_weights() -> None:
    offloaded: Any = accelerate.cpu_offload(tiny_qwen2_5_vl(1), execution_device=torch.device("cpu"))
    model = vlcache_fx.compile(offloaded, lowering="eager", policy="full")
    pair = Pair(model, tiny_qwen2_5_vl(1), model.vlcache)
    for seed in range(2):
        error, report = pair.run(**qwen_inputs(3, 4, [(8, 8, 0)], seed))
        assert error < 1e-5
        assert (report["mode"], report["reason_code"]) == ("bypass", Reason.NO_STREAM)
