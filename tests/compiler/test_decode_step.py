"""Graphs in which one token attends to a cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.decode_step import DecodeStep
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.kinds import classify, without_reuse
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.options import Options
from vlcache_fx.runtime.decode_step import DecodeStepRunner

from ..runtime.helpers import own_compiler_state
from .graphs import STEP, Stepping, traced_call

# Inductor imports parts of torch that use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_compile_by_layers_and_eager(eager: Engine) -> None:
    model = Stepping().eval()
    graph, args = traced_call(model, STEP)
    with pytest.raises(UnsupportedGraphError) as refused:
        classify(graph)
    assert refused.value.reason is Reason.PAST_KEYS
    found = without_reuse(graph, refused.value)
    assert isinstance(found, DecodeStep)
    by_layers = Engine(Options(lowering="inductor"))
    for engine in (eager, by_layers):
        run = found.compile(engine)
        assert isinstance(run, DecodeStepRunner) is (engine is by_layers)
        with torch.no_grad():
            torch.testing.assert_close(run(*args)[0], model(**STEP))
        assert engine.last_report is None
        assert engine.refusals == []
