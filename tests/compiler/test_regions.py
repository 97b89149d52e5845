"""Dynamo's recompile limit, and calls that it runs uncompiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.backend import engine_for
from vlcache_fx.capture.dynamo_settings import RECOMPILE_LIMIT
from vlcache_fx.compiler.regions import TORCH_RECOMPILE_LIMIT
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import Pair, own_compiler_state, unique_salt, with_api, with_backend

PROMPTS = [tiny_vlm_inputs(before, 5, [(20, 0)], text_seed=before) for before in (3, 9, 14)]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_user_limit_stays_and_uncompiled_calls_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for make in (with_api, with_backend):
        caplog.clear()
        pair: Pair = make(tiny_vlm(last_only=False), dynamic=False, policy="full")
        limits = {"capture_scalar_outputs": False, "recompile_limit": 1}
        with torch._dynamo.config.patch(limits), caplog.at_level(logging.WARNING, "vlcache_fx"):
            if make is with_api:  # with_api sets a limit itself; this tests the hook
                with torch.compiler.set_stance("force_eager"):
                    offs = [pair.run(**prompt)[0] for prompt in PROMPTS]
                expected = 3
            else:
                offs = [pair.run(**prompt)[0] for prompt in PROMPTS]
                assert torch._dynamo.config.recompile_limit == 1
                expected = 2
        assert offs == [0.0, 0.0, 0.0]
        assert pair.engine.stats()["uncompiled_calls"] == expected
        assert pair.report["mode"] == "bypass"
        assert "[uncompiled]" in pair.report["reason"]
        assert "\n" not in pair.report["reason"]
        assert sum("[uncompiled]" in record.message for record in caplog.records) == 1


def test_strict_raises_uncompiled_calls() -> None:
    pair = with_backend(tiny_vlm(last_only=False), dynamic=False, strict=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        pair.run(**PROMPTS[0])
        with pytest.raises(UnsupportedGraphError, match="ran the call uncompiled"):
            pair.run(**PROMPTS[1])


def test_failed_call_is_not_counted() -> None:
    pair = with_backend(tiny_vlm(last_only=False))
    pair.run(**PROMPTS[0])
    with pytest.raises(TypeError, match="nonsense"), torch.no_grad():
        pair.model(nonsense=1)
    assert pair.engine.stats()["uncompiled_calls"] == 0


class Shared(nn.Module):
    """Many models share the code object of ``forward``, as with decorators."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(2, 2), factor

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * self.factor


def test_default_limit_is_raised_for_shared_code() -> None:
    with torch._dynamo.config.patch(recompile_limit=TORCH_RECOMPILE_LIMIT):
        for factor in range(1, TORCH_RECOMPILE_LIMIT + 3):
            pair = with_backend(Shared(factor))
            graphs = pair.engine.graph_calls
            got, expected = pair.both(x=torch.ones(3, 2))
            assert torch.equal(got, expected)
            assert pair.engine.graph_calls == graphs + 1
        assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT


def test_limit_is_raised_per_thread() -> None:
    """Dynamo's config values are thread-local in newer versions of torch."""
    with torch._dynamo.config.patch(recompile_limit=TORCH_RECOMPILE_LIMIT):
        pair = with_backend(Shared(2), dynamic=False)
        pair.both(x=torch.ones(1, 2))
        rows = range(2, TORCH_RECOMPILE_LIMIT + 3)
        with ThreadPoolExecutor(1) as pool:
            pairs = list(pool.map(lambda count: pair.both(x=torch.ones(count, 2)), rows))
    assert all(torch.equal(got, expected) for got, expected in pairs)
    assert pair.engine.stats()["uncompiled_calls"] == 0


def test_watch_once_per_region() -> None:
    model, options = tiny_vlm(last_only=False), {"lowering": "eager", "salt": unique_salt()}
    compiled = torch.compile(model.forward, backend="vlcache", options=options, dynamic=False)
    with torch.no_grad():
        for prompt in PROMPTS:
            compiled(**prompt)
        assert engine_for(options).stats()["uncompiled_calls"] == 0
        with torch.compiler.set_stance("force_eager"):
            compiled(**PROMPTS[0])
    assert engine_for(options).stats()["uncompiled_calls"] == 1
